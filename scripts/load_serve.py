#!/usr/bin/env python
"""A service under load: many callers, who leave, send nonsense and read slowly, and a SIGTERM while they ask.

    python scripts/load_serve.py                                  # 64 callers for a minute, the demo model
    XLSTM_MODEL=DIR XLSTM_CACHE_MEMORY_MB=256 python scripts/load_serve.py --clients 16 --seconds 10

The service takes its settings from their variables. Every question is asked alone first. A run is good (exit code 0)
if every whole answer is the one that came alone, every malformed body is a 4xx, no request is lost, the service ends
with 0 after SIGTERM, and its memory stays within the computed need. Lost is: taken, and ended without an answer. A
request that comes after SIGTERM may be refused.
"""

import argparse
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from xlstm_ray.client.service import Service, state_path  # noqa: E402
from xlstm_ray.errors import ServiceError  # noqa: E402

PATH = "/v1/completions"
WORDS = (
    "the king of France and a long river under old stone walls where people sing every new year before winter".split()
)
BAD = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"prompt": 5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "nonsense": 1}',
    b'{"prompt": "a", "model": "another"}',
    b'{"prompt": "a", "state": "none"}',
    b'{"prompt": "a", "n": 1e9}',
    b'{"prompt": ' + b"[" * 5000,
)


def questions(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Bodies of prompts of 4 to 600 words, greedy or drawn by a seed."""
    made = []
    for number in range(count):
        prompt = " ".join(rng.choices(WORDS, k=2 ** rng.randrange(2, 9) + rng.randrange(4)))
        drawn = {"temperature": 1, "seed": number} if number % 3 == 0 else {"temperature": 0}
        made.append({"prompt": f"{number} {prompt}", "max_tokens": rng.randrange(2, 40), **drawn})
    return made


class Load:
    """The callers of one service, each a thread, and what they saw: counts by a word, and faults in words."""

    def __init__(self, url: str, asked: list[dict[str, Any]]):
        self.service = Service(url, tries=0)
        self.url, self.asked = url, asked
        self.alone = [self.service.post(PATH, body)["choices"][0]["text"] for body in asked]
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.stop, self.draining = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def call(self, rng: random.Random) -> None:
        """One caller, until all stop."""
        kinds = {self.whole: 6, self.stream: 6, self.leave: 4, self.nonsense: 2, self.slowly: 1, self.document: 1}
        while not self.stop.is_set():
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            try:
                kind(rng)
            except ServiceError as err:
                self._refused(kind.__name__, err)
                self.stop.wait(rng.uniform(0.05, min(1.0, err.retry_s or 0.2)))
            except OSError as err:  # of a socket of ours
                self._count(f"{kind.__name__}, not connected") if self.draining.is_set() else self._fault(
                    kind.__name__, err
                )

    # -- what callers do -----------------------------------------------------------------------------------------------
    def whole(self, rng: random.Random) -> None:
        n = rng.randrange(len(self.asked))
        self._check("whole", n, self.service.post(PATH, self.asked[n])["choices"][0]["text"])

    def stream(self, rng: random.Random) -> None:
        n = rng.randrange(len(self.asked))
        self._check("stream", n, self._text(self.asked[n]))

    def leave(self, rng: random.Random) -> None:
        """Leave before an answer, or in the middle of it."""
        body = {**self.asked[rng.randrange(len(self.asked))], "stream": True, "max_tokens": 200}
        with self._sent(body) as connection:
            connection.settimeout(60)
            for _ in range(rng.randrange(4)):
                connection.recv(1 << 10)
        self._count("left")

    def nonsense(self, rng: random.Random) -> None:
        try:
            with self.service.open("POST", PATH, rng.choice(BAD)):
                self._fault("nonsense", "was taken")
        except ServiceError as err:
            if err.status in (None, 503):
                raise
            self._count("nonsense, 4xx") if 400 <= err.status < 500 else self._fault("nonsense", err)

    def slowly(self, rng: random.Random) -> None:
        """Read nothing of an answer for a while, with little room for it on the way."""
        n = rng.randrange(len(self.asked))
        with self._sent({**self.asked[n], "stream": True}, buffer=2048) as connection:
            time.sleep(rng.uniform(0.5, 3))
            connection.settimeout(60)
            said = b"".join(iter(lambda: connection.recv(512), b""))
        head, _, rest = said.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            self._count(f"slowly, {head[9:12].decode() or 'not connected'}")
            return
        events = [json.loads(line[6:]) for line in re.findall(rb"data: \{.*", rest)]
        if b"data: [DONE]" in rest:
            self._check("slowly", n, "".join(choice["text"] for event in events for choice in event["choices"]))
        else:
            self._fault("slowly", rest[-200:])

    def document(self, rng: random.Random) -> None:
        """Let a document be read, ask it, and delete it."""
        n, name = rng.randrange(len(self.asked)), f"load-{rng.randrange(1 << 40):010x}"
        prompt = self.asked[n]["prompt"]
        self.service.post("/v1/states", {"id": name, "prompt": prompt, "ttl": 60})
        info: dict[str, Any] = {}
        for now in self.service.events(state_path(name, "/events")):
            info = now
        if info.get("status") == "ready":
            body = {key: value for key, value in self.asked[n].items() if key != "prompt"}
            self._check("document", n, self._text({**body, "state": name}))
            self.service.delete(state_path(name))
        elif self.draining.is_set():
            self._count("document, stopped by SIGTERM")
        else:
            self._fault("document", info)

    # ------------------------------------------------------------------------------------------------------------------
    def _text(self, body: dict[str, Any]) -> str:
        events = self.service.events(PATH, {**body, "stream": True})
        return "".join(choice["text"] for event in events for choice in event["choices"])

    def _sent(self, body: dict[str, Any], buffer: int | None = None) -> socket.socket:
        data = json.dumps(body).encode()
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", int(self.url.rpartition(":")[2])))
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        return connection

    def _check(self, kind: str, n: int, text: str) -> None:
        if text == self.alone[n]:
            self._count(f"{kind}, right")
        else:
            self._fault(kind, f"question {n}: {text[:80]!r}, alone {self.alone[n][:80]!r}")

    def _refused(self, kind: str, err: ServiceError) -> None:
        if err.status in (429, 503) or (err.status == 409 and self.draining.is_set()):
            self._count(f"{kind}, {err.status}")
        elif self.draining.is_set() and "cannot be reached" in str(err) or "no service answers" in str(err):
            self._count(f"{kind}, not connected")
        else:
            self._fault(kind, err)

    def _count(self, word: str) -> None:
        with self._lock:
            self.seen[word] += 1

    def _fault(self, kind: str, what: object) -> None:
        with self._lock:
            self.faults.append(f"{kind}: {what}")


def computed_need(slots: int) -> int:
    """Bytes that so many requests at once need, of a service with the same settings."""
    import xlstm_ray

    with xlstm_ray.load() as lm:
        return lm.plan.room.serving(slots).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    command = [sys.executable, "-m", "xlstm_ray", "serve", "--port", "0", "--deterministic"]
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        try:
            found = next(
                (m for line in server.stdout if (m := re.search(r"at (http://\S+)/v1 \((\d+) slots", line))), None
            )
            if found is None:
                errors.seek(0)
                raise SystemExit(errors.read())
            load, slots = Load(found[1], questions(rng, args.questions)), int(found[2])
            process, peak = psutil.Process(server.pid), 0
            callers = [
                threading.Thread(target=load.call, args=(random.Random(rng.random()),), daemon=True)
                for _ in range(args.clients)
            ]
            for caller in callers:
                caller.start()
            end = time.monotonic() + args.seconds
            while time.monotonic() < end:
                peak = max(peak, process.memory_info().rss)
                time.sleep(0.2)
            load.draining.set()
            server.send_signal(signal.SIGTERM)
            code = server.wait(120)
            load.stop.set()
            for caller in callers:
                caller.join(60)
            errors.seek(0)
            said = errors.read()
        finally:
            server.kill()
            server.wait()
    need = computed_need(slots)
    hung = sum(caller.is_alive() for caller in callers)
    for word, count in sorted(load.seen.items()):
        print(f"{word:<32} {count:>7,}")
    print(f"exit code {code}; {hung} callers hang; peak {peak >> 20} MiB of the computed {need >> 20} MiB")
    for fault in load.faults[:20]:
        print(f"FAULT {fault}")
    good = not load.faults and code == 0 and not hung and peak <= need and "Traceback" not in said
    if "Traceback" in said:
        print(said)
    print(f"{args.clients} callers, {args.seconds:g} s, {len(load.faults)} faults: {'good' if good else 'NOT GOOD'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
