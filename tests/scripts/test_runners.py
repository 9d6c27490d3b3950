"""The Apple guide's commands word for word, and models from a hub: a local server of a repository's layout."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_model

import xlstm_ray

SCRIPTS = Path(__file__).parents[2] / "scripts"
REPO = "someone/tiny-xlstm"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CUT_AT = 12 << 20
COMMIT = hashlib.sha1(b"of the repository").hexdigest()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, hidden_size=64, num_hidden_layers=2, num_heads=4, eos_token_id=None)
    return directory


def run(script: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    env = {**os.environ, "PYTORCH_ENABLE_MPS_FALLBACK": "0", "XLSTM_CHUNKWISE_BACKEND": "native", **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


# -- a local checkpoint ------------------------------------------------------------------------------------------------
def test_the_guides_quick_start(model):
    words = ["--model_path", model, "--prompt", "The capital of France is", "--max_new_tokens", "5"]
    done = run("run_local_xlstm_mps.py", *words, "--workers", "6", "--heads-per-band", "4")
    assert done.returncode == 0, done.stderr
    assert "decode 5 tokens" in done.stderr
    assert re.search(r"^total \d+\.\d s$", done.stderr, re.MULTILINE)
    lm = xlstm_ray.load(model, device="cpu", chunkwise_backend="native", heads_per_band=4)
    assert done.stdout == "".join(lm.generate("The capital of France is", max_new_tokens=5)) + "\n"


def test_the_guides_high_memory_run(model):
    words = ["--model_path", model, "--chunkwise-backend", "ray_compiled_steps", "--chunk-size", "64"]
    words += ["--heads-per-band", "4", "--prompt", "…", "--max_new_tokens", "2", "--mem-soft-mb", "215000"]
    words += ["--mem-hard-mb", "235000", "--mem-action", "warn", "--no-mem-shrink", "--json"]
    done = run("run_local_xlstm_mps.py", *words, XLSTM_T_INNER="1")  # compiles sooner
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["backend"], row["chunk_size"], row["new_tokens"]) == ("ray_compiled_steps", 64, 2)


def test_a_mistake_is_one_line(model):
    done = run("run_local_xlstm_mps.py", "--model_path", model, "--prompt", "a", "--workers", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["error: --workers is 0; allowed: a whole number from 1 to 256"]


# -- a hub -------------------------------------------------------------------------------------------------------------
class Hub(ThreadingHTTPServer):
    """The part of a hub's interface that a client uses to fetch a model repository.

    After CUT_AT bytes of the file `cuts` the connection is cut, once; `refuses` it is asked for in vain from then on.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cuts: str | None = None
        self.refuses = False
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        files = {file.name: file for file in hub.folder.iterdir()}
        found = re.fullmatch(rf"/api/models/{REPO}/(revision|tree)/([^/]+)", path)
        if found and found[2] not in ("main", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif found and found[1] == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        elif found:
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": self.etag(file)}
                for name, file in files.items()
            ]
            self.answer(200, json.dumps(rows).encode())
        elif (found := re.fullmatch(rf"/{REPO}/resolve/[^/]+/(.+)", path)) and found[1] in files:
            self.send_file(files[found[1]])
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def send_file(self, file: Path) -> None:
        hub, data = self.server, file.read_bytes()
        headers = {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and file.name == hub.cuts:
            if hub.refuses and start:
                self.answer(503, b"")
                return
            body = data[start : None if start else CUT_AT]
        self.answer(status, body, headers, len(data) - start)
        self.close_connection = len(body) < len(data) - start

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's files. Clients write 10 MiB at a time, so the second shard is larger."""
    directory = tmp_path_factory.mktemp("published")
    make_model(directory, hidden_size=768, num_hidden_layers=1, num_heads=4, eos_token_id=None)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    first = {name: tensor for name, tensor in tensors.items() if "ffn" not in name}
    weight_map = {}
    for shard, part in zip(SHARDS, (first, {n: t for n, t in tensors.items() if n not in first}), strict=True):
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert (directory / SHARDS[1]).stat().st_size > CUT_AT
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 301]}))
    (directory / "pickled.bin").write_bytes(b"never to be fetched")
    (directory / "modeling.py").write_text("raise SystemExit('never to be run')")
    return directory


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    with Hub(published) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(hub: Hub, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    words = "--repo", REPO, "--max_new_tokens", "3", "--json", *words
    return run("run_hf_xlstm_metal.py", *words, HF_ENDPOINT=hub.url, HF_HOME=str(home))


def have(hub: Hub, home: Path, *, offline: bool) -> Path:
    """Only the download, in its own process: huggingface_hub reads its environment once."""
    code = f"from xlstm_ray.hub import download; print(download({REPO!r}, offline={offline}))"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def fetched(hub: Hub) -> list[tuple[str, str]]:
    """The requested files, and the first byte of each request."""
    asked = [(path, where) for method, path, where in hub.asked if method == "GET"]
    return [(Path(path).name, where or "") for path, where in asked if "/resolve/" in path]


FILES = ["config.json", "generation_config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"]


def test_a_broken_connection_is_taken_up_where_it_broke(hub, published, tmp_path):
    hub.cuts = SHARDS[1]
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    (where,) = [where for name, where in fetched(hub) if where]
    assert 0 < int(where.removeprefix("bytes=").removesuffix("-")) <= CUT_AT
    row = json.loads(done.stdout)
    assert row["prompt_tokens"] == len("The capital of France is")
    model = Path(row["model"])
    assert model.is_relative_to(tmp_path)
    assert model.name == COMMIT
    assert sorted(path.name for path in model.iterdir()) == FILES
    for name in FILES:
        assert (model / name).read_bytes() == (published / name).read_bytes()

    hub.asked.clear()
    assert have(hub, tmp_path, offline=True) == model
    assert not hub.asked


def test_after_a_download_that_failed_the_next_fetches_only_the_rest(hub, tmp_path):
    hub.cuts, hub.refuses = SHARDS[1], True
    broken = fetch(hub, tmp_path)
    assert (broken.returncode, broken.stdout) == (1, "")
    last = broken.stderr.splitlines()[-1]
    assert last.startswith(f"error: {REPO} could not be fetched: ")
    assert last.endswith("run it again for the rest")
    assert "Traceback" not in broken.stderr
    # What has arrived is not taken for the whole.
    assert "not whole in the cache" in fetch(hub, tmp_path, "--offline").stderr
    hub.cuts = None
    hub.asked.clear()
    have(hub, tmp_path, offline=False)
    assert fetched(hub) == [(SHARDS[1], "")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--revision", "no-such"), ("no revision 'no-such'", "branch, tag or commit")),
        (("--repo", "someone/other"), ("someone/other is not there", "hf auth login")),
        (("--repo", "a b/c"), ("'a b/c' is not the name of a repository",)),
        (("--offline",), ("not whole in the cache",)),
    ],
    ids=["revision", "repository", "name", "offline"],
)
def test_what_cannot_be_fetched_is_said_in_one_line(words, said, hub, tmp_path):
    done = fetch(hub, tmp_path, *words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    for part in said:
        assert part in line


def test_a_hub_that_does_not_answer(published, tmp_path):
    with Hub(published) as silent:
        pass  # its port is closed again
    line = fetch(silent, tmp_path).stderr.splitlines()[-1]
    assert line.startswith(f"error: {REPO} is not whole in the cache, and the hub does not answer")


# -- the command -------------------------------------------------------------------------------------------------------
def program(hub: Hub, home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xlstm_ray", *map(str, words)]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "XLSTM_CHUNKWISE_BACKEND": "native"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_a_hubs_name_for_a_model_is_refused_with_the_command_that_fetches_it(hub, tmp_path):
    name = f"{REPO}@{COMMIT}"
    refused = program(hub, tmp_path, "generate", "--model", name, "--prompt", "a")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert not hub.asked
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: {name}: is not a directory here")
    (command,) = re.findall(r"`xlstm-ray (.+?)`", line)
    assert command == f"download {name}"
    fetched_now = program(hub, tmp_path, *command.split())
    assert fetched_now.returncode == 0, fetched_now.stderr
    model = Path(fetched_now.stdout.strip())
    assert sorted(path.name for path in model.iterdir()) == FILES
    use = next(line for line in fetched_now.stderr.splitlines() if line.startswith("to use it: "))
    words = shlex.split(use.removeprefix("to use it: "))
    assert words[:3] == [sys.executable, "-m", "xlstm_ray"]
    row = json.loads(program(hub, tmp_path, *words[3:], "-n", "2", "--json").stdout)
    assert (row["model"], row["new_tokens"]) == (str(model), 2)
    hub.asked.clear()
    again = program(hub, tmp_path, "download", name, "--offline")
    assert again.stdout == fetched_now.stdout
    assert not hub.asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("someone/other",), "someone/other is not there"),
        ((f"{REPO}@no-such",), "no revision 'no-such'"),
        ((f"{REPO}@",), "names no revision after the @"),
        (("a b/c",), "'a b/c' is not the name of a repository"),
        ((REPO, "--offline"), "not whole in the cache"),
    ],
)
def test_what_the_command_cannot_fetch_is_one_line(words, said, hub, tmp_path):
    done = program(hub, tmp_path, "download", *words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert said in line


def test_a_download_without_a_terminal_says_that_it_goes_on(hub, tmp_path):
    code = "import sys; from xlstm_ray.cli import reporter; reporter.EVERY_S = 0.02; "
    code += f"from xlstm_ray.cli.app import main; sys.argv = ['xlstm-ray', 'download', {REPO!r}]; main()"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^\S+ downloading {REPO}: 0:00:\d\d so far$", done.stderr, re.MULTILINE)
