"""Clients that nobody here wrote, unmodified: OpenAI's own, and curl in the README's words."""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from services import model, reading_line, serving_here
from test_documents import until

from xlstm_ray.text.template import Template

__all__ = ["model"]

ROOT = Path(__file__).parents[2]
KEY = "the-key-of-this-test"
TALK: list[Any] = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def service(model):
    template = Template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "test", {})
    settings = {"cache_memory_mb": 64}
    with serving_here(model, keys=(KEY,), template=template, queue=0, slots=2, settings=settings) as here:
        yield here


@pytest.fixture
def client(service):
    with OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openais_client_completes_and_streams(service, client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2, n=2, stop=["never said"], seed=1, user="me")
    text = "".join(service.engine.generate("Once", max_new_tokens=8, temperature=0))
    assert [choice.text for choice in whole.choices] == [text, text]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 8
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (4, 16, 20)
    raw = client.completions.with_raw_response.create(**asked)
    assert raw.headers["x-xlstm-cache"] == "hit tokens=4 of=4 tier=host"
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 4
    options: Any = {"include_progress": True}
    told = list(client.completions.create(**{**asked, "prompt": "new " * 40}, stream=True, stream_options=options))
    assert [chunk.progress["phase"] for chunk in told if not chunk.choices][:2] == ["queued", "prefill"]  # type: ignore


def test_openais_client_chats(service, client):
    asked: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_completion_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    message = whole.choices[0].message
    assert (message.role, whole.choices[0].finish_reason) == ("assistant", "length")
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 6
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    again = client.chat.completions.create(**{**asked, "messages": [*TALK, message, *TALK]})
    assert again.choices[0].message.content is not None


def test_openais_client_understands_what_is_wrong(service, client):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="a", temperature=200)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{service.url}/v1", api_key="another", max_retries=0).models.list()
    tools: Any = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(openai.BadRequestError, match="not served here"):
        client.chat.completions.create(model="tiny", messages=TALK, tools=tools)


def test_its_event_loop_is_uvloop(service):
    """It sends all that an iteration has written by one call, and keeps the interpreter's lock meanwhile."""
    assert type(service.server._loop.result()).__module__ == "uvloop"


def test_openais_client_comes_again_when_there_is_no_room(model):
    endless = {"model": "tiny", "prompt": "b", "max_tokens": 1 << 30, "stream": True}
    with serving_here(model, queue=0, slots=2, answer_tokens=1 << 30) as service:
        client = OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0)
        busy = [client.completions.create(**endless) for _ in range(2)]
        with pytest.raises(openai.InternalServerError) as full:
            client.completions.create(model="tiny", prompt="a")
        assert (full.value.status_code, full.value.code) == (503, "full")
        seen = []

        def make_room(response: object) -> None:
            """They leave when somebody was refused, and are gone when he comes again."""
            seen.append(response.status_code)
            for stream in busy:
                stream.close()
            until(lambda: not service.desk.under_way)

        with openai.DefaultHttpxClient(event_hooks={"response": [make_room]}) as http:
            patient = client.with_options(max_retries=1, http_client=http)
            said = patient.completions.create(model="tiny", prompt="a", max_tokens=2)
        assert said.choices[0].finish_reason == "length"
    assert seen == [503, 200]


def test_a_closed_stream_frees_its_place(service, client):
    stream = client.completions.create(model="tiny", prompt="b", max_tokens=4000, stream=True)
    next(stream)
    assert service.desk.under_way == 1
    stream.close()
    until(lambda: not service.desk.under_way)


def test_openais_client_asks_a_document(service, client):
    with client.with_options(timeout=60) as c:
        c.post("/states", cast_to=object, body={"id": "book", "prompt": "A long book. " * 9})
        while c.get("/states/book", cast_to=object)["status"] != "ready":  # type: ignore[index]
            time.sleep(0.05)
        got = c.completions.create(model="tiny", prompt="Why?", max_tokens=4, extra_body={"state": "book"})
    assert got.usage is not None
    assert got.usage.prompt_tokens == 13 * 9 + 4


def test_openais_asyncio_client_asks_many_at_once(service):
    async def all_of_them() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=9) as client:
            asks = [
                client.completions.create(model="tiny", prompt=f"{n}", max_tokens=5, temperature=0) for n in range(6)
            ]
            return [got.choices[0].text for got in await asyncio.gather(*asks)]

    alone = ["".join(service.engine.generate(f"{n}", max_new_tokens=5, temperature=0)) for n in range(6)]
    assert asyncio.run(all_of_them()) == alone


def commands(section: str) -> list[str]:
    """The lines of a section's shell block, without comments."""
    readme = (ROOT / "README.md").read_text()
    block = readme.partition(f"\n## {section}\n")[2].partition("\n## ")[0].partition("```sh\n")[2].partition("```")[0]
    lines = [re.sub(r"\s+# .*", "", line) for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def started(line: str, directory: Path, env: dict[str, str]) -> "tuple[subprocess.Popen[str], str]":
    """A service that a line starts, with kernels that need not be compiled; its address."""
    line = line.replace("./scripts/", f"{ROOT}/scripts/").replace("DIR", shlex.quote(str(ROOT / "xlstm_ray" / "demo")))
    process = subprocess.Popen(
        ["bash", "-c", f"exec {line} --port 0 --chunkwise-backend native"],
        cwd=directory,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, reading_line(process.stdout, r"at (http://\S+)/v1")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The programs of this environment, as ./scripts/run would have made it."""
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".installed-serve").touch()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "VENV": str(venv)}


def test_the_third_command_of_the_readme_serves(env, tmp_path):
    line = commands("Start")[2]
    assert line == "EXTRAS=serve ./scripts/run serve"
    process, url = started(f"env {line}", tmp_path, env)
    try:
        done = subprocess.run(["curl", "-s", f"{url}/v1/models"], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["data"][0]["id"] == "demo"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_the_readmes_commands_serve_and_ask(env, tmp_path):
    install, serve, *asks = commands("Serve")
    assert install == "pip install '.[serve]'"
    (tmp_path / "book.txt").write_text("The capital of France is")
    process, url = started(serve, tmp_path, env)
    said = {}
    try:
        for line in asks:
            assert line.startswith(("curl ", "xlstm-ray client "))
            command = line.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sS --fail-with-body ", 1)
            command += f" --url {url}" if line.startswith("xlstm-ray") else ""
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            said[line] = done.stdout
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    texts = [json.loads(text)["choices"][0]["text"] for text in said.values() if '"choices"' in text]
    assert len(texts) == 2
    assert " Paris" in texts[0]
    assert (tmp_path / "book.state").stat().st_size > 100_000
    assert '"status":"ready"' in "".join(said.values())
    name, answer, listed = (text for line, text in said.items() if line.startswith("xlstm-ray"))
    assert (name, len(answer) > 1) == ("again\n", True)
    assert all(f"\n{one} " in listed for one in ("book", "again"))
