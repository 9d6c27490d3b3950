"""Generation: the pieces of text of an answer, step by step, and the state after it."""

from collections.abc import Callable, Iterator, Sequence

import torch

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.decode import Decoder, Start
from xlstm_ray.engine.driver import Snapshot
from xlstm_ray.engine.result import PrefillResult
from xlstm_ray.engine.windows import group_size
from xlstm_ray.errors import UsageError
from xlstm_ray.sampling import Sampling
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.history import Row


class Generation:
    """What `generate` returns: iterate for pieces of text (one prompt) or lists of pieces (a batch)."""

    def __init__(
        self,
        core: Core,
        prefill: PrefillResult,
        sampling: Sampling,
        max_new_tokens: int,
        should_stop: Callable[[], bool],
        *,
        end_tokens: tuple[int, ...],
        last: bool,
    ):
        self.prefill = prefill
        self.sampling = sampling
        self._core = core
        self._limit, self._should_stop, self._last = max_new_tokens, should_stop, last
        before = prefill.state
        self._decoder = Decoder(
            core.running.executor,
            Start(
                {name: tensor for name, tensor in before.tensors.items() if name != "logits"},
                prefill.logits,
                before.tokens,
            ),
            sampling,
            end_tokens,
            model=core.plan.model,
            warm_up=self._warm_up,
        )
        self._streams = [core.text.stream(row.end) for row in before.rows]
        self._pieces: list[list[str]] = [[] for _ in before.rows]
        self._finished: set[int] = set()  # rows whose text is at its end
        if prefill.complete and max_new_tokens > 1:  # before text is shown; smaller calls when they are wanted
            self._decoder.compile_s = core.warm_up(group_size(before.batch), [1])
        self._run = core.runs
        if prefill.complete:
            core.turn.begin(self)

    def _warm_up(self, rows: int) -> float:
        seconds = self._core.warm_up(rows, [1])
        if seconds:
            self._core.on_phase("decoding")
        return seconds

    def rows(self) -> Iterator[list[str]]:
        """A piece of text for each row, step by step. Of more than 16 rows, 16 get theirs at a time; others' are ''."""
        if not self.prefill.complete:
            return  # stopped on the way: there is nothing to decode from yet
        steps = self._decoder.run(self._limit, self._should_stop)
        try:
            while True:
                with self._core.turn.of("step", self):
                    self._require_own_state()
                    step = next(steps, None)
                pieces = self._pieces_of(step)
                if step is not None or any(pieces):
                    yield pieces
                if step is None:
                    return
        finally:
            self._core.turn.end(self)

    def _pieces_of(self, step: list[int | None] | None) -> list[str]:
        """What this step, or the end, adds to each row's text."""
        pieces = [""] * len(self._streams)
        for b in self._decoder.now.rows:
            stream, token = self._streams[b], None if step is None else step[b]
            piece = "" if token is None else stream.step(token)
            ends = self._decoder.ended_by[b] is not None or (self._last and (step is None or self._decoder.now.done))
            if ends and b not in self._finished:
                piece += stream.finish()
                self._finished.add(b)
            self._pieces[b].append(piece)
            pieces[b] = piece
        return pieces

    @property
    def texts(self) -> list[str]:
        """The text so far, a row."""
        return ["".join(pieces) for pieces in self._pieces]

    @property
    def finish_reasons(self) -> list[str]:
        """Why each row's answer ended: stop (an end token, see `stop_tokens`), length (the limit) or cancelled."""
        reasons = []
        for b, token in enumerate(self._decoder.ended_by):
            limit = "length" if self._decoder.of_row(b).steps >= self._limit else "cancelled"
            reasons.append(limit if token is None else "stop")
        return reasons

    @property
    def stop_tokens(self) -> list[tuple[int, str] | None]:
        """The end token that ended each row and its text; None for a row that none has ended."""
        text = self._core.text
        return [None if token is None else (token, text.text_of(token)) for token in self._decoder.ended_by]

    def __iter__(self) -> Iterator[str]:
        if len(self._streams) != 1:
            raise UsageError("a batch has no single text to iterate over; use rows()")
        return (pieces[0] for pieces in self.rows())

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens made so far, a row, without the end token."""
        return self._decoder.tokens

    @property
    def ready(self) -> list[int]:
        """The rows whose answer is whole: those of each group of up to 16 that has come to its end."""
        return [b for group in self._decoder.groups if group.done for b in group.rows]

    @property
    def compile_s(self) -> float:
        return self._decoder.compile_s

    @property
    def decode_s(self) -> float:
        return sum(group.seconds for group in self._decoder.groups)

    @property
    def decode_steps(self) -> int:
        """How many times every row that had not ended, of those that are decoded together, was given a token."""
        return sum(group.steps for group in self._decoder.groups)

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens a second over all rows, of those that took a step: a row's first one comes with the prefill."""
        return self._tok_s(range(len(self.tokens)), self.decode_s)

    def speed(self, b: int) -> dict[str, float | int | None]:
        """decode_s, decode_tok_s and decode_steps of the rows that are decoded together with row b."""
        group = self._decoder.of_row(b)
        rate = self._tok_s(group.rows, group.seconds)
        return {"decode_s": group.seconds, "decode_tok_s": rate, "decode_steps": group.steps}

    def _tok_s(self, rows: Sequence[int], seconds: float) -> float | None:
        stepped = sum(max(0, len(self.tokens[b]) - 1) for b in rows)
        return stepped / seconds if stepped and seconds > 0 else None

    def state(self) -> RecurrentState:
        """The state after everything made so far: generating from it goes on where this stopped."""
        before = self.prefill.state
        if not before.complete:
            return before
        with self._core.turn.of("state", self):
            return self._state_after(before)

    def _state_after(self, before: RecurrentState) -> RecurrentState:
        self._require_own_state()
        tensors = self._decoder.state()
        rows = []
        for row, made, text, stream in zip(before.rows, self.tokens, self.texts, self._streams, strict=True):
            seen = None if row.text is None else row.text.extend(text.encode())
            rows.append(Row(tokens=row.tokens.extend(made), text=seen, end=stream.end()))
        tokens = [row.tokens.length for row in rows]
        snapshot = Snapshot(tokens, torch.stack(self._decoder.logits), tensors)
        return self._core.state(snapshot, rows, before.grid, self.sampling, complete=True)

    def _require_own_state(self) -> None:
        """An engine has one state at a time: after another prefill it is no longer this generation's."""
        _ = self._core.running.executor  # it may have been closed
        if self._run != self._core.runs:
            raise UsageError(
                "this generation's engine has begun another prompt since, so it cannot go on; "
                "take its state() before that, and generate from it"
            )
