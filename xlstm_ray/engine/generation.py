"""Generation: an answer's pieces of text, step by step, and the state after it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.decode import Decoder, Made, Start
from xlstm_ray.engine.driver import Snapshot
from xlstm_ray.engine.result import PrefillResult
from xlstm_ray.engine.wanted import Wanted
from xlstm_ray.engine.windows import group_size
from xlstm_ray.errors import UsageError
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.answer import Answer, Finish
from xlstm_ray.text.history import Row
from xlstm_ray.text.tokenizer import NextToken


class Generation:
    """What `generate` returns: iterate for pieces of text (one answer) or lists of pieces (a batch).

    A row is an answer. Answers to one prompt follow each other; `prompts` has for each row its prompt's place in
    `prefill`.
    """

    def __init__(
        self,
        core: Core,
        prefill: PrefillResult,
        wanted: Wanted,
        should_stop: Callable[[], bool],
        *,
        end_tokens: tuple[int, ...],
        last: bool,
    ):
        self.prefill = prefill
        self.sampling = wanted.usual
        self._core, self._should_stop = core, should_stop
        before = prefill.state
        asked = [(b, one) for b, sampling in enumerate(wanted.rows) for one in sampling.one_by_one()]
        places = self.prompts = [b for b, _ in asked]
        self._answers = [Answer(one, end_tokens, core.text.stream(before.rows[b].end), last=last) for b, one in asked]
        self._decoder = Decoder(
            core.lane(),
            core.states,
            Start(
                core.rows_of(before).pick(places),
                prefill.logits if places == list(range(before.batch)) else prefill.logits[places],
                [before.tokens[b] for b in places],
                [wanted.prompts[b] for b in places],
            ),
            self._answers,
            end_tokens,
            model=core.plan.model,
            warm_up=partial(_warm_up, core),
        )
        if prefill.complete and any(sampling.max_new_tokens > 1 for sampling in wanted.rows):
            # Compile before text is shown; smaller calls are compiled on first use.
            self._decoder.compile_s = core.warm_up(group_size(len(places)), [1])

    def rows(self) -> Iterator[list[str]]:
        """A piece of text for each row, step by step. 16 rows are decoded at a time; other rows get ''."""
        if not self.prefill.complete:
            return  # the prefill was stopped: there is nothing to decode from
        steps = self._decoder.run(self._should_stop)
        while True:
            with self._core.turn.of("step"):
                _ = self._core.running.executor  # it may have been closed
                pieces = next(steps, None)
            if pieces is None:
                break
            yield pieces
        pieces = [answer.end("cancelled") for answer in self._answers]  # answers that have not ended yet
        if any(pieces):
            yield pieces

    @property
    def texts(self) -> list[str]:
        """Each row's text so far, without the stop text that ended it."""
        return [answer.text for answer in self._answers]

    @property
    def said(self) -> list[str]:
        """Each row's text of all tokens so far, with the stop text that ended it."""
        return [answer.said for answer in self._answers]

    @property
    def finishes(self) -> list[Finish | None]:
        """Why each row's answer ended, and by which token or text; None if it has not ended."""
        return [answer.finish for answer in self._answers]

    @property
    def finish_reasons(self) -> list[str]:
        """Why each row's answer ended: stop (an end token or a stop text), length (the limit) or cancelled."""
        return ["cancelled" if finish is None else finish.reason for finish in self.finishes]

    @property
    def stop_tokens(self) -> list[tuple[int, str] | None]:
        """The end token that ended each row, and its text; None for other rows."""
        by = [None if finish is None else finish.by for finish in self.finishes]
        return [(token, self._core.text.text_of([token])) if isinstance(token, int) else None for token in by]

    @property
    def stop_texts(self) -> list[str | None]:
        """The stop text that ended each row; None for other rows."""
        by = [None if finish is None else finish.by for finish in self.finishes]
        return [text if isinstance(text, str) else None for text in by]

    def logprobs(self, b: int) -> list[tuple[NextToken, list[NextToken]]] | None:
        """Row b's tokens with log-probabilities, and the likeliest at each place; None if it did not ask for them."""
        if self._answers[b].sampling.logprobs is None:
            return None

        def known(token: int, logprob: float) -> NextToken:
            return NextToken(token, self._core.text.text_of([token]), logprob)

        made: list[Made] = self._decoder.made[b]
        both = zip(self.tokens[b], made, strict=True)
        return [(known(token, m.logprob), [known(*best) for best in m.likeliest]) for token, m in both]

    def __iter__(self) -> Iterator[str]:
        if len(self._answers) != 1:
            raise UsageError("a batch has no single text to iterate over; use rows()")
        return (pieces[0] for pieces in self.rows())

    @property
    def tokens(self) -> list[list[int]]:
        """Each row's tokens so far, without the end token."""
        return [answer.tokens for answer in self._answers]

    @property
    def ready(self) -> list[int]:
        """The rows of all finished groups (of up to 16 rows): their answers are complete."""
        return [b for group in self._decoder.groups if group.done for b in group.rows]

    @property
    def compile_s(self) -> float:
        return self._decoder.compile_s

    @property
    def decode_s(self) -> float:
        return sum(group.seconds for group in self._decoder.groups)

    @property
    def decode_steps(self) -> int:
        """The number of steps of the rows decoded together; each step gives a token to every row that has not ended."""
        return sum(group.steps for group in self._decoder.groups)

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens a second over all rows. A row's first token comes with the prefill and does not count."""
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
        """The state after all tokens so far: generating from it continues this answer."""
        before = self.prefill.state
        if not before.complete:
            return before
        with self._core.turn.of("state"):
            _ = self._core.running.executor  # it may have been closed
            held = self._decoder.rows()
        rows = []
        for row, answer in zip((before.rows[b] for b in self.prompts), self._answers, strict=True):
            seen = None if row.text is None else row.text.extend(answer.said.encode())
            rows.append(Row(tokens=row.tokens.extend(answer.tokens), text=seen, end=answer.stream.end()))
        tokens = [row.tokens.length for row in rows]
        snapshot = Snapshot(tokens, torch.stack(self._decoder.logits), held)
        return self._core.state(snapshot, rows, before.numerics, self.sampling, complete=True)


def _warm_up(core: Core, rows: int) -> float:
    seconds = core.warm_up(rows, [1])
    if seconds:
        core.on_phase("decoding")
    return seconds
