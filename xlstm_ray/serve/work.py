"""The answers that one HTTP request asks for: to one or more prompts, n to each."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from xlstm_ray.engine.request import End, Event, Handle, Piece, Queued, Reading, Request
from xlstm_ray.sampling import Sampling
from xlstm_ray.serve.desk import Desk
from xlstm_ray.serve.limits import Account
from xlstm_ray.serve.metrics import Track
from xlstm_ray.serve.refusals import Refused
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.prompt import Prompt


@dataclass(frozen=True)
class Ask:
    """prompts: whole ones, or what comes after `state`. sampling: its n is the number of answers to each; None: none.

    echo: for each prompt, the text that its answers begin with. scores: the prompt's own log-probabilities are wanted,
    and so many likeliest ones.
    """

    prompts: Sequence[Prompt | None]
    sampling: Sampling | None
    priority: int = 0
    tenant: str = ""
    state: RecurrentState | None = None
    echo: Sequence[str] | None = None
    scores: int | None = None

    @property
    def n(self) -> int:
        """Answers to each prompt; the prompt itself counts as one where there is none."""
        return 1 if self.sampling is None else self.sampling.n

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.n

    def request(self, prompt: Prompt | None) -> Request:
        """For all answers to one prompt."""
        whole = self.state is None
        return Request(
            prompt if whole else None,
            append=None if whole else prompt,
            state=self.state,
            sampling=self.sampling,
            priority=self.priority,
            tenant=self.tenant,
            prompt_logprobs=self.scores,
        )


@dataclass
class Used:
    """Tokens of the work so far. prompts: what was found of each. finished: why answers ended."""

    answer: int = 0
    prompts: dict[int, Queued] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    replica: str = ""  # of the first prompt, where there are several

    @property
    def prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(found.prompt_tokens for found in self.prompts.values())

    @property
    def cached(self) -> int:
        """Those of them that a state had already."""
        return sum(found.resumed_tokens for found in self.prompts.values())

    def usage(self) -> dict[str, object]:
        """As a reply has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def cache(self, *, of_state: bool) -> str:
        """What the reply's header says of the cache: hit or miss, and why it was no more."""
        word = "state" if of_state else "hit" if self.cached else "miss"
        uses = [found.use for found in self.prompts.values()]
        tiers, reasons = [use.tier for use in uses if use.tier], [use.reason for use in uses if use.reason]
        tier = f" tier={tiers[0]}" if tiers else ""
        told = bool(reasons) and self.cached < self.prompt and not of_state  # after a state nothing is looked up
        reason = f' reason="{reasons[0]}"' if told else ""
        return f"{word} tokens={self.cached} of={self.prompt}{tier}{reason}"


class Work:
    """Begin it, then take its `events`: each with the number of its answer. An answer's End comes once.

    account: of whoever asks.
    """

    def __init__(self, desk: Desk, ask: Ask, account: Account):
        self._desk, self._ask, self._account = desk, ask, account
        self.used = Used()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._quiet = False  # whether nothing has happened since the last look
        self._left = ask.answers  # whose ends are to come
        self._early: list[tuple[int, Event]] = []  # what came before the last prompt was looked up
        self._handles: list[Handle] = []
        self._since = perf_counter()
        self._lengths: dict[int, list[int]] = {}  # of the answers that have ended, by their prompt

    async def begin(self) -> None:
        """Hand all prompts in, and wait until each was looked up in the cache. Raises Refused."""
        ask, n = self._ask, self._ask.n
        self._account.admit()
        self._desk.admit(ask.answers)
        try:
            for p, prompt in enumerate(ask.prompts):
                hears = [self._hear(p * n + i, first=i == 0) for i in range(n)]
                self._handles += await self._desk.submit(ask.request(prompt), hears)
        except Refused:
            self._desk.release(ask.answers - len(self._handles))
            self.cancel()
            raise
        waiting = set(range(ask.answers))
        while waiting:
            found = await self._events.get()
            assert found is not None
            number, event = found
            if isinstance(event, End) and event.error is not None:  # before anything was sent: the reply says so
                self.cancel()
                raise Refused.of(event.error)
            if isinstance(event, Queued | End):
                waiting.discard(number)
            self._early.append((number, event))

    async def events(self, ping_s: float) -> AsyncIterator[tuple[int, Event] | None]:
        """Everything that happens until the last answer's end; None where nothing has for up to so many seconds."""
        looks = asyncio.get_running_loop().create_task(self._look(ping_s / 2))
        try:
            while self._left:
                found = self._early.pop(0) if self._early else await self._events.get()
                self._quiet = False
                if found is not None:
                    self._left -= isinstance(found[1], End)
                    self.used.answer += isinstance(found[1], Piece) and found[1].token is not None
                yield found
        finally:
            looks.cancel()

    async def _look(self, each_s: float) -> None:
        """Look now and then whether anything has happened: a timer for each event takes longer than all else of it."""
        while True:
            await asyncio.sleep(each_s)
            if self._quiet and self._events.empty():
                self._events.put_nowait(None)
            self._quiet = True

    @property
    def waits(self) -> bool:
        """Whether the next event is still to come."""
        return bool(self._left) and not self._early and self._events.empty()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for handle in self._handles:
            handle.cancel()

    def _hear(self, number: int, *, first: bool) -> Callable[[Event], None]:
        """What hears the events of an answer. first: of those to one prompt, which is read once for all of them."""
        answer = self._ask.sampling is not None
        track = Track(self._desk.metrics, self._account, since=self._since, prompt=first, answer=answer)

        def hear(event: Event) -> None:
            track(event)
            if first and isinstance(event, Queued):
                self.used.prompts[number] = event
                self.used.replica = self.used.replica or event.replica
            elif first and isinstance(event, End) and number in self.used.prompts:
                self.used.prompts[number] = self.used.prompts[number].at_end(event.usage)
            if isinstance(event, End):
                self._desk.release(1)
                self.used.finished.append(event.finish.reason)
                lengths = self._lengths.setdefault(number // self._ask.n, [])
                lengths.append(event.usage.answer_tokens)
                if answer and event.finish.reason in ("stop", "length") and len(lengths) == self._ask.n:
                    self._desk.metrics.observe("request_max_num_generation_tokens", max(lengths))
            if first or not isinstance(event, Reading):
                self._events.put_nowait((number, event))

        return hear
