"""A loaded model over HTTP, by OpenAI's protocol: one ASGI app with the engine in its process."""
