"""Ctrl-C, SIGTERM and SIGHUP: stop after this tile, or leave at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from xlstm_ray.cli.output import leave_terminal
from xlstm_ray.errors import Interrupted


class Stop:
    """Whether Ctrl-C, SIGTERM or SIGHUP has come: prefill checks it between tiles, decoding between tokens.

    The first signal is confirmed at once. A second Ctrl-C interrupts at once. So does a first one before the first
    check: compiling takes long, and there is nothing to keep yet.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signals: list[int] = []
        self.asked = False
        self.at = "tile"
        self._say = say

    def __call__(self) -> bool:
        self.asked = True
        return bool(self.signals)

    def handle(self, number: int, _frame: object) -> None:
        self.signals.append(number)
        if number == signal.SIGHUP:
            leave_terminal()
        if not self.asked or (len(self.signals) > 1 and number == signal.SIGINT):
            raise KeyboardInterrupt
        if len(self.signals) == 1:
            self._say(f"stopping after this {self.at}; Ctrl-C again: now")


@contextmanager
def handling(handler: Any, *numbers: int) -> Iterator[None]:
    """Send these signals to a handler while the block runs; works only on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {n for n in numbers if n == signal.SIGHUP and signal.getsignal(n) is signal.SIG_IGN}  # under nohup
    before = {number: signal.signal(number, handler) for number in numbers if number not in kept}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def stop_on_signals(say: Callable[[str], None] = lambda text: None, rescued: Callable[[], str] = str) -> Iterator[Stop]:
    """say: prints from the signal handler. rescued: saves an interrupted run's state, and returns a text about it."""
    stop = Stop(say)
    with handling(stop.handle, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        try:
            yield stop
        except KeyboardInterrupt:
            raise stopped_by(f"interrupted{rescued() if stop.asked else ''}", stop) from None


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Ctrl-C ends the process at once: libraries that are being imported may swallow an exception."""

    def leave(_number: int, _frame: object) -> None:
        os.write(2, b"\x1b[?25hinterrupted\n" if os.isatty(2) else b"interrupted\n")  # a bar hides the cursor
        os._exit(130)

    with handling(leave, signal.SIGINT):
        yield


def stopped_by(text: str, stop: Stop) -> Interrupted:
    error = Interrupted(text)
    if signal.SIGTERM in stop.signals:
        error.exit_code = 128 + signal.SIGTERM
    elif signal.SIGHUP in stop.signals:
        error.exit_code = 128 + signal.SIGHUP
    return error
