#!/usr/bin/env python
"""A service under load: many callers, who leave, send nonsense and read slowly, and a SIGTERM while they ask.

    python scripts/load_serve.py                                  # 64 callers for a minute, the demo model
    XLSTM_MODEL=DIR XLSTM_CACHE_MEMORY_MB=256 python scripts/load_serve.py --clients 16 --seconds 10
    python scripts/load_serve.py --replicas 2 --kill-every 15     # replicas, of which one dies now and then
    python scripts/load_serve.py --replicas 1 --max-replicas 2    # and whether one more comes, and goes again

The service takes its settings from their variables. Every question is asked alone first. A run is good (exit code 0)
if every whole answer is the one that came alone, every malformed body is a 4xx, no request is lost, the service ends
with 0 after SIGTERM, and its memory stays within the computed need. Lost is: taken, and ended without an answer. A
request that comes after SIGTERM may be refused. With replicas, callers ask again until they are answered, replicas are
killed by SIGKILL, and their memory is not looked at.
"""

import argparse
import itertools
import json
import os
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from arguments import positive, whole

ROOT = Path(__file__).resolve().parents[1]

from xlstm_ray.client.service import Service, state_path  # noqa: E402
from xlstm_ray.errors import ServiceError  # noqa: E402
from xlstm_ray.supervisor.status import status  # noqa: E402

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

    def __init__(self, url: str, asked: list[dict[str, Any]], *, again: bool):
        self.again, self._numbers = again, itertools.count()
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
            same = rng.getstate()
            try:
                kind(rng)
            except ServiceError as err:
                if self.again and err.status in (0, 503) and kind in (self.whole, self.stream, self.document):
                    self._again(kind, rng, same)
                    continue
                self._refused(kind.__name__, err)
                self.stop.wait(rng.uniform(0.05, min(1.0, err.retry_s or 0.2)))
            except OSError as err:  # of a socket of ours
                self._count(f"{kind.__name__}, not connected") if self.draining.is_set() else self._fault(
                    kind.__name__, err
                )

    def _again(self, kind: Callable[[random.Random], None], rng: random.Random, same: Any) -> None:
        """Ask the same until it is answered; only a service that stops may not do so."""
        for number in itertools.count(1):
            if self.draining.is_set() or self.stop.is_set():
                self._count(f"{kind.__name__}, not again after SIGTERM")
                return
            self._count(f"{kind.__name__}, asked again")
            self.stop.wait(min(5.0, 0.1 * 2**number))
            rng.setstate(same)
            try:
                kind(rng)
                return
            except ServiceError as err:
                if err.status not in (0, 503):
                    self._refused(kind.__name__, err)
                    return

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
        elif self.again and b'"replica_lost"' in rest:  # this caller does not ask again
            self._count("slowly, told that its replica is lost")
        else:
            self._fault("slowly", rest[-200:])

    def document(self, rng: random.Random) -> None:
        """Let a document be read, ask it, and delete it."""
        n, name = rng.randrange(len(self.asked)), f"load-{next(self._numbers)}"
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


def replicas(state_dir: Path) -> list[int]:
    """The processes of the service's replicas."""
    heads = status(state_dir).heads
    return [actor.pid for item in heads for actor in item.actors if actor.name.startswith("ServeReplica:")]


def watch(args: argparse.Namespace, server: "subprocess.Popen[str]", state_dir: Path, rng: random.Random) -> int:
    """Let callers go on for a while; returns the largest memory of the service's own process, in bytes.

    Kills a replica now and then, and prints how many there are whenever their number changes.
    """
    process, peak, before, began = psutil.Process(server.pid), 0, 0, time.monotonic()
    kill_at = began + (args.kill_every or args.seconds)
    while (now := time.monotonic()) < began + args.seconds:
        peak = max(peak, process.memory_info().rss)
        if args.replicas is not None:
            there = replicas(state_dir)
            if len(there) != before:
                print(f"{now - began:5.0f} s: {len(there)} replicas")
            before = len(there)
            if args.kill_every is not None and now > kill_at and there:
                victim = rng.choice(there)
                print(f"{now - began:5.0f} s: replica {victim} is killed")
                os.kill(victim, signal.SIGKILL)
                kill_at += args.kill_every
        time.sleep(0.2)
    return peak


def calm(args: argparse.Namespace, state_dir: Path) -> None:
    """Wait until the replicas that were added are gone."""
    began = time.monotonic()
    while (count := len(replicas(state_dir))) > args.replicas:
        time.sleep(1)
    print(f"{time.monotonic() - began:5.0f} s without callers: {count} replicas")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=positive, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=positive, default=24)
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--replicas", type=positive)
    parser.add_argument("--max-replicas", type=positive)
    parser.add_argument("--kill-every", type=float, help="seconds between two deaths of a replica")
    args = parser.parse_args()
    if args.replicas is None and (args.max_replicas is not None or args.kill_every is not None):
        parser.error("--max-replicas and --kill-every need --replicas")
    rng = random.Random(args.seed)
    command = [sys.executable, "-m", "xlstm_ray", "serve", "--port", "0", "--deterministic"]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as folder:
        state_dir, variables = Path(folder), dict(os.environ)
        for name in ("replicas", "max_replicas"):
            if (count := getattr(args, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(count)]
        if args.replicas is not None:
            variables["XLSTM_RAY_STATE_DIR"] = folder
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=variables)
        try:
            found = next(
                (m for line in server.stdout if (m := re.search(r"at (http://\S+)/v1 \((\d+) slots", line))), None
            )
            if found is None:
                errors.seek(0)
                raise SystemExit(errors.read())
            load = Load(found[1], questions(rng, args.questions), again=args.replicas is not None)
            callers = [
                threading.Thread(target=load.call, args=(random.Random(rng.random()),), daemon=True)
                for _ in range(args.clients)
            ]
            for caller in callers:
                caller.start()
            peak = watch(args, server, state_dir, rng)
            if args.max_replicas is not None:
                load.stop.set()
                calm(args, state_dir)
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
    hung = sum(caller.is_alive() for caller in callers)
    for word, count in sorted(load.seen.items()):
        print(f"{word:<36} {count:>7,}")
    good = not load.faults and code == 0 and not hung and "Traceback" not in said
    room = ""
    if args.replicas is None:
        need = computed_need(int(found[2]))
        room = f"; peak {peak >> 20} MiB of the computed {need >> 20} MiB"
        good = good and peak <= need
    print(f"exit code {code}; {hung} callers hang{room}")
    for fault in load.faults[:20]:
        print(f"FAULT {fault}")
    if "Traceback" in said:
        print(said)
    print(f"{args.clients} callers, {args.seconds:g} s, {len(load.faults)} faults: {'good' if good else 'NOT GOOD'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
