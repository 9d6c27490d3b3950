"""A local hub: a server of a model repository's layout, and a repository that it publishes."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny import make_model

REPO = "someone/tiny-xlstm"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = ["config.json", "generation_config.json", *SHARDS, "model.safetensors.index.json", "tokenizer.json"]
CUT_AT = 12 << 20
COMMIT = hashlib.sha1(b"of the repository").hexdigest()


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
        self.tokens: set[str | None] = set()  # that callers gave

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
        if path.startswith(("/api/models/", f"/{REPO}/")):  # not what the library wants to know for itself
            hub.asked.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
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


def publish(directory: Path, hidden_size: int) -> None:
    """Write a repository's files."""
    make_model(directory, hidden_size=hidden_size, num_hidden_layers=1, num_heads=4, eos_token_id=None)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    first = {name: tensor for name, tensor in tensors.items() if "ffn" not in name}
    weight_map = {}
    for shard, part in zip(SHARDS, (first, {n: t for n, t in tensors.items() if n not in first}), strict=True):
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 301]}))
    (directory / "pickled.bin").write_bytes(b"never to be fetched")
    (directory / "modeling.py").write_text("raise SystemExit('never to be run')")


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that serves this folder."""
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetched(hub: Hub) -> list[tuple[str, str]]:
    """The requested files, and the first byte of each request."""
    asked = [(path, where) for method, path, where in hub.asked if method == "GET"]
    return [(Path(path).name, where or "") for path, where in asked if "/resolve/" in path]
