"""The progress of a run on standard error: a bar on a terminal, JSON lines, or a line every half minute."""

import json
import math
import os
import sys
import threading
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from xlstm_ray.csvlog import now

if TYPE_CHECKING:
    from xlstm_ray.engine.driver import Progress


ProgressKind = Literal["auto", "bar", "ndjson", "none"]

EVERY_S = 30.0  # between two lines without a terminal


class Reporter:
    """Reports phases (`phase`), and tiles (`tile`) or answers (`answers`) of a run, until it is closed.

    auto: a bar on a terminal, else a line every EVERY_S. ndjson: an object for every tile or answer, and for a phase
    that takes longer than EVERY_S.
    """

    def __init__(self, kind: ProgressKind):
        terminal = sys.stderr.isatty()
        self._kind = kind if kind != "auto" else "bar" if terminal else "lines"
        self._phase, self._began = "starting", perf_counter()
        self._what, self._numbers = "", ""  # what is counted in this phase, and how far it is
        self._closed = threading.Event()
        self._bar: Any = None
        if self._kind == "bar":
            self._open_bar()
        if self._kind != "none":
            threading.Thread(target=self._remind, daemon=True).start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Report nothing from now on."""
        self._closed.set()
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.live.transient = not self._numbers  # only a bar with numbers stays on the screen
            bar.stop()

    def at_once(self, text: str) -> None:
        """Print from a signal handler: this thread may be in the middle of printing."""
        if self._kind == "ndjson":
            text = json.dumps({"event": "stopping", "time": now(), "text": text})
        os.write(2, f"{chr(13) + chr(27) + '[2K' if self._bar is not None else ''}{text}\n".encode())

    def phase(self, text: str) -> None:
        """A phase begins."""
        self._phase, self._began, self._numbers = text, perf_counter(), ""
        if self._bar is not None:
            self._bar.reset(self._task, description=text, total=None, numbers="")

    def tile(self, p: "Progress") -> None:
        """A tile is done."""
        row = {
            "tiles_done": p.tiles_done,
            "tokens_done": p.tokens_done,
            "tokens_total": p.tokens_total,
            "tile_s": p.tile_seconds,
            "tok_s": p.tokens_per_s,
            "eta_s": p.eta_s,
        }
        numbers = _numbers(p.tokens_done, p.tokens_total, p.tokens_per_s, p.eta_s)
        self._count("prefill", p.tokens_done, p.tokens_total, numbers, {"event": "tile", "time": now(), **row})

    def document(self, done: int, total: int, rate: float | None, left: float | None) -> None:
        """A service has read so many tokens. rate: of them a second; left: seconds; None: it does not know yet."""
        row = {"event": "document", "time": now(), "tokens_done": done, "tokens_total": total}
        self._count("prefill", done, total, _numbers(done, total, rate, left), {**row, "tok_s": rate, "eta_s": left})

    def answers(self, done: int, total: int, tokens: int) -> None:
        """An answer has ended. tokens: of the prompts and answers so far."""
        seconds = perf_counter() - self._began
        rate, eta = tokens / seconds if seconds else 0.0, seconds / done * (total - done)
        row = {"answers_done": done, "answers_total": total, "tokens_done": tokens, "tok_s": rate, "eta_s": eta}
        numbers = f"{done:,}/{total:,} answers  {rate:,.0f} tokens/s  {timedelta(seconds=math.ceil(eta))} left"
        self._count("answers", done, total, numbers, {"event": "answer", "time": now(), **row})

    def compiled(self, done: int, total: int) -> None:
        """Calls of a model are compiled."""
        numbers = f"{done}/{total} calls"
        self._count("compiling", done, total, numbers, {"event": "call", "time": now(), "done": done, "total": total})

    def parts(self, done: int, total: int) -> None:
        """Parts of a model are written."""
        seconds = perf_counter() - self._began
        eta = seconds / done * (total - done) if done else 0.0
        numbers = f"{done:,}/{total:,} parts  {timedelta(seconds=math.ceil(eta))} left"
        row = {"event": "part", "time": now(), "parts_done": done, "parts_total": total, "eta_s": eta}
        self._count("quantizing", done, total, numbers, row)

    def _count(self, what: str, done: int, total: int, numbers: str, row: dict[str, Any]) -> None:
        self._what, self._numbers = what, numbers
        if self._kind == "ndjson" and not self._closed.is_set():
            _err(json.dumps(row))
        elif self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total, numbers=numbers)

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # takes the width that the numbers leave
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(self._phase, total=None, numbers="")
        self._bar.start()

    def _remind(self) -> None:
        """Report how long a phase takes: every second on a terminal, else every EVERY_S."""
        while not self._closed.wait(1 if self._kind == "bar" else EVERY_S):
            phase, numbers, bar, seconds = self._phase, self._numbers, self._bar, perf_counter() - self._began
            passed = timedelta(seconds=round(seconds))
            if self._kind == "bar":
                if not numbers and bar is not None:
                    bar.update(self._task, numbers=f"{passed}")
            elif self._kind == "ndjson":
                if not numbers:
                    _err(json.dumps({"event": "phase", "time": now(), "phase": phase, "seconds": seconds}))
            else:
                _err(f"{now()} {self._what}: {numbers}" if numbers else f"{now()} {phase}: {passed} so far")


def _numbers(done: int, total: int, rate: float | None, left: float | None) -> str:
    speed = "" if rate is None else f"  {rate:,.0f} tokens/s"
    return f"{done:,}/{total:,} tokens{speed}" + (
        "" if left is None else f"  {timedelta(seconds=math.ceil(left))} left"
    )


def _err(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
