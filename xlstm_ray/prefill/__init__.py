"""A prompt through a model: the plan (what), the executor (where), the driver (when)."""
