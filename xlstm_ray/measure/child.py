"""A child process that has loaded a model and prefills on request."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xlstm_ray import errors
from xlstm_ray.errors import XlstmRayError, one_line
from xlstm_ray.threads import collect_seldom

AUTO = "auto"  # the backend that a run takes


class Child:
    """A child process that has loaded the model for one backend (or AUTO) and length, and prefills on request.

    on_note: called with the engine's remarks while it runs.
    """

    def __init__(self, tokens: int, backend: str, asked: dict[str, Any], on_note: Callable[[str], object]):
        self.name, self._on_note = f"{backend} at {tokens} tokens", on_note
        own = None if backend == AUTO else backend
        self._order = {"tokens": tokens, "asked": _plain({**asked, "chunkwise_backend": own})}

    def __enter__(self) -> "Child":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "xlstm_ray.measure.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is handled here; the end of its standard input ends it
        )
        self._say(json.dumps(self._order))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()  # after Ctrl-C or another child's error its result is not wanted
        self._process.communicate()

    def figures(self) -> dict[str, Any]:
        """The figures of one prefill."""
        self._say("run")
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = json.loads(line)
            if "error" in found:
                raise getattr(errors, found["kind"])(f"{self.name}: {found['error']}")
            if "note" not in found:
                return found
            self._on_note(found["note"])
        raise XlstmRayError(f"bench: {self.name} ended with exit code {self._process.wait()}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise XlstmRayError(f"bench: {self.name} ended with exit code {self._process.wait()}") from None


def _plain(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in asked.items() if v is not None}


def _serve() -> None:
    """The child: reads its settings from standard input, then a line for each prefill; answers with lines of JSON."""
    collect_seldom()
    order = json.loads(sys.stdin.readline())
    asked = order["asked"]
    if "config" in asked:
        asked["config"] = Path(asked["config"])
    try:
        from torch import get_num_threads

        from xlstm_ray.choose import setup_of
        from xlstm_ray.engine.engine import Engine

        with Engine(setup_of(**asked), on_note=lambda text: _answer({"note": text})) as engine:
            prompt = [n * 7919 % engine.config.vocab_size for n in range(order["tokens"])]
            for _ in sys.stdin:
                stats = engine.prefill(prompt).stats
                figures = {
                    "backend": engine.backend.name,
                    "device": str(engine.device),
                    "dtype": engine.numerics.dtype,
                    "model": engine.model_path.resolve().name,
                    "threads": get_num_threads(),
                    "prefill_s": stats.prefill_s,
                    "peak_memory_bytes": stats.peak_memory_bytes,
                    "peak_process_bytes": stats.peak_process_bytes,
                    "peak_device_bytes": stats.peak_device_bytes,
                }
                _answer(figures)
    except XlstmRayError as err:
        _answer({"error": one_line(err), "kind": type(err).__name__})


def _answer(row: dict[str, Any]) -> None:
    print(json.dumps(row) + "\n", end="", flush=True)  # in one write: notes come from other threads too


if __name__ == "__main__":
    _serve()
