"""`xlstm-ray bench serve`: what callers of a service do, made up here, and what they saw: a table and a picture.

Texts are of random words, which no service has seen. Nothing but OpenAI's API is needed; a service that keeps documents
is asked by them, too.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

from xlstm_ray.client.service import Service
from xlstm_ray.errors import UsageError
from xlstm_ray.measure.endpoint import Answer, Endpoint
from xlstm_ray.measure.picture import pyplot, save

PREFIXES, PREFIX, SUFFIX = 10, 512, 128  # texts that others begin with, and their tokens
QUESTION = 64  # tokens of a question or a message
TURNS = 12  # of a chat
LATER_S = 0.2  # after the streams, the long prompt comes
WORDS = (
    "time year people way day thing man world life hand part child eye woman place work week case point company number "
    "group problem fact water house night city side home story end head line river state book name road letter word "
    "before after under over again always never often small large early late open close north south old new"
).split()


@dataclass(frozen=True)
class Sizes:
    """Tokens of a long prompt, a document, an answer; questions to a document, streams at once, and times of each."""

    prompt: int = 4096
    document: int = 65536
    answer: int = 64
    questions: int = 8
    streams: int = 15
    rounds: int = 3


@dataclass(frozen=True)
class Row:
    """What callers saw of one kind of request. seconds: from the first one's beginning to the last one's end."""

    workload: str
    what: str
    answers: list[Answer]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        ttft = [answer.ttft for answer in self.answers]
        gaps = [gap for answer in self.answers for gap in answer.gaps]
        tokens = sum(answer.tokens for answer in self.answers)
        return {
            "workload": self.workload,
            "what": self.what,
            "requests": len(self.answers),
            "prompt_tokens": _sum([answer.prompt for answer in self.answers]),
            "cached_tokens": _sum([answer.cached for answer in self.answers]),
            "answer_tokens": tokens,
            "seconds": self.seconds,
            "tok_s": tokens / self.seconds,
            "ttft_p50_s": _percent(ttft, 0.5),
            "ttft_p99_s": _percent(ttft, 0.99),
            "itl_p50_s": _percent(gaps, 0.5),
            "itl_p99_s": _percent(gaps, 0.99),
        }

    @property
    def line(self) -> str:
        row = self.to_json()
        times = [f"{_ms(row[f'{name}_s']):>9}" for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")]
        counts = [f"{'-' if row[name] is None else format(row[name], ','):>10}" for name in COUNTS]
        what = f"{self.workload}: {self.what:<{32 - len(self.workload)}} {row['requests']:>4}"
        return f"{what} {' '.join(counts)} {' '.join(times)} {row['tok_s']:>8,.0f} {self.seconds:>8.2f}"


COUNTS = "prompt_tokens", "cached_tokens"
HEADER = (
    f"{'workload':<34} {'n':>4} {'prompt':>10} {'cached':>10} {'TTFT p50':>9} {'p99, ms':>9} {'ITL p50':>9} "
    f"{'p99, ms':>9} {'tokens/s':>8} {'seconds':>8}"
)


class Callers:
    """Asks an endpoint as callers do. seed: of all texts."""

    def __init__(self, service: Service, model: str | None, sizes: Sizes, seed: int):
        self._sizes, self._rng = sizes, random.Random(seed)
        self.endpoint = Endpoint(service, model, self._words)

    def run(self, workload: str) -> Iterator[Row]:
        """The rows of one of WORKLOADS."""
        return WORKLOADS[workload](self)

    # -- workloads -----------------------------------------------------------------------------------------------------
    def prefix(self) -> Iterator[Row]:
        """Texts with one of a few beginnings, one after another."""
        prefixes = [self._text(PREFIX) for _ in range(PREFIXES)]
        for what, rounds in (("first of its prefix", 1), ("prefix was seen", self._sizes.rounds)):
            texts = [f"{text}\n{self._text(SUFFIX)}" for _ in range(rounds) for text in self._shuffled(prefixes)]
            yield self._one_by_one("prefix", what, [partial(self._ask, text) for text in texts])

    def document(self) -> Iterator[Row]:
        """Questions to a long document: kept by the service, sent again, and with nothing known."""
        endpoint, count = self.endpoint, self._sizes.questions
        text = self._text(self._sizes.document)
        if endpoint.documents:
            name = f"bench-{self._rng.randrange(1 << 32):08x}"
            yield self._one_by_one("document", "read under a name", [partial(endpoint.read, name, text)])
            asks = [partial(self._ask, self._text(QUESTION), name) for _ in range(count)]
            try:
                yield self._one_by_one("document", "questions to the name", asks)
            finally:
                endpoint.forget(name)
            text = self._text(self._sizes.document)
        asks = [partial(self._ask, f"{text}\n{self._text(QUESTION)}") for _ in range(count)]
        yield self._one_by_one("document", "sent with a question", asks[:1])
        if asks[1:]:
            yield self._one_by_one("document", "sent again with another", asks[1:])
        fresh = [f"{self._text(4)} {text}\n{self._text(QUESTION)}" for _ in range(count)]
        yield self._one_by_one("document", "unseen with each question", [partial(self._ask, one) for one in fresh])

    def chat(self) -> Iterator[Row]:
        """A conversation that is sent whole at each turn."""
        messages = [{"role": "system", "content": self._text(QUESTION)}]
        kind = "chat" if self.endpoint.chats else "chat as text"

        def turn() -> Answer:
            messages.append({"role": "user", "content": self._text(QUESTION)})
            said = self.endpoint.chat(messages, self._sizes.answer)
            messages.append({"role": "assistant", "content": said.text})
            return said

        yield self._one_by_one(kind, "first turn", [turn])
        yield self._one_by_one(kind, f"turns 2 to {TURNS}", [turn] * (TURNS - 1))

    def edited(self) -> Iterator[Row]:
        """Long prompts; each again; each changed at four fifths of its length."""
        prompts = [self._text(self._sizes.prompt) for _ in range(self._sizes.rounds)]
        yield self._one_by_one("edited", "new", [partial(self._ask, text) for text in prompts])
        yield self._one_by_one("edited", "the same again", [partial(self._ask, text) for text in prompts])
        cut = [text[: text.index(" ", len(text) * 4 // 5)] for text in prompts]
        changed = [f"{text} {self._text(self._sizes.prompt // 5)}" for text in cut]
        yield self._one_by_one("edited", "changed at 80 %", [partial(self._ask, text) for text in changed])

    def unique(self) -> Iterator[Row]:
        """Prompts of which nothing was ever seen."""
        lengths = [self._sizes.prompt // n for n in (8, 4, 2, 1)] * self._sizes.rounds
        asks = [partial(self._ask, self._text(length)) for length in lengths]
        yield self._one_by_one("unique", f"{lengths[0]} to {lengths[3]} tokens", asks)

    def mixed(self) -> Iterator[Row]:
        """Streams at once, and the same beside a long prompt that is read."""
        streams = [partial(self._ask_long, self._text(QUESTION)) for _ in range(self._sizes.streams)]
        yield self._at_once("mixed", f"{len(streams)} streams", streams)[0]
        streams = [partial(self._ask_long, self._text(QUESTION)) for _ in range(self._sizes.streams)]
        yield from self._at_once("mixed", "streams beside a document", streams, self._text(self._sizes.document))

    # ------------------------------------------------------------------------------------------------------------------
    def _ask(self, text: str, state: str | None = None) -> Answer:
        return self.endpoint.ask(text, self._sizes.answer, state)

    def _ask_long(self, text: str) -> Answer:
        return self.endpoint.ask(text, 4 * self._sizes.answer)

    def _one_by_one(self, workload: str, what: str, asks: Sequence[Callable[[], Answer]]) -> Row:
        answers = [ask() for ask in asks]
        return Row(workload, what, answers, sum(answer.ended - answer.began for answer in answers))

    def _at_once(
        self, workload: str, what: str, asks: Sequence[Callable[[], Answer]], long: str | None = None
    ) -> list[Row]:
        with ThreadPoolExecutor(len(asks) + 1) as pool:
            began = perf_counter()
            running = [pool.submit(ask) for ask in asks]
            beside = None
            if long is not None:
                sleep(LATER_S)
                beside = pool.submit(self.endpoint.ask, long, 1)
            answers = [one.result() for one in running]
            rows = [Row(workload, what, answers, max(answer.ended for answer in answers) - began)]
            if beside is not None:
                read = beside.result()
                rows.append(Row(workload, "the document", [read], read.ended - read.began))
        return rows

    def _text(self, tokens: int) -> str:
        """A text of about so many tokens, of which nothing was seen."""
        return self._words(max(1, round(tokens * self.endpoint.words_a_token)))

    def _words(self, count: int) -> str:
        return " ".join([str(self._rng.randrange(10**9)), *self._rng.choices(WORDS, k=count - 1)])

    def _shuffled(self, texts: Sequence[str]) -> list[str]:
        return self._rng.sample(texts, len(texts))


WORKLOADS: dict[str, Callable[[Callers], Iterator[Row]]] = {
    name: getattr(Callers, name) for name in ("prefix", "document", "chat", "edited", "unique", "mixed")
}


def chosen(workloads: str) -> list[str]:
    """Names with commas between. Raises UsageError."""
    names = [word.strip() for word in workloads.split(",")]
    for name in names:
        if name not in WORKLOADS:
            raise UsageError(f"`workloads` names {name!r}; there are: {', '.join(WORKLOADS)}")
    return list(dict.fromkeys(names))


def draw(rows: Sequence[Row], about: str, path: Path, *, overwrite: bool = False) -> None:
    """Draw each row's times, from the median to the 99th percentile. Writes the whole file or none."""
    plot = pyplot()
    figure, axes = plot.subplots(1, 2, figsize=(12, 1.5 + 0.34 * len(rows)), layout="constrained", sharey=True)
    found = [row.to_json() for row in rows]
    for axis, name, title in zip(axes, ("ttft", "itl"), ("to the first token", "between two tokens"), strict=True):
        for place, row in enumerate(found):
            low, high = row[f"{name}_p50_s"], row[f"{name}_p99_s"]
            if low is not None:
                axis.plot([low * 1e3, high * 1e3], [place, place], color="C0", linewidth=4, solid_capstyle="butt")
                axis.plot([low * 1e3], [place], "o", color="C1")
        axis.set(xscale="log", xlabel=f"milliseconds {title}: median, and up to p99")
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{row.workload}: {row.what}" for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(about, fontsize=10)
    save(figure, path, "xlstm-ray bench serve", overwrite=overwrite)


def _percent(values: list[float], share: float) -> float | None:
    if share == 0.5 and values:
        return median(values)
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else None


def _sum(values: list[int | None]) -> int | None:
    """None where one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"
