"""Where each row of a prefill continues a state, or why it cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xlstm_ray.engine.tokens import Stored, Tail, Tokens, ids
from xlstm_ray.errors import StateError
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.detokenize import TextEnd
from xlstm_ray.text.history import LaterTrail, Row, TextTrail
from xlstm_ray.text.ondisk import TextFile, TokenFile
from xlstm_ray.text.prompt import Given
from xlstm_ray.text.tokenizer import Text

NEW = Row()  # of a prompt that begins; one for all, since to make it takes longer than to find where a prompt begins


@dataclass
class Going:
    """A row during a prefill. begun: what was known of it at its start; trail: of its tokens that were seen so far."""

    tokens: Tokens  # (T,) int32, on the CPU
    begun: Row
    given: memoryview | TokenFile  # the new tokens that the caller gave
    text: Callable[[], TextTrail | None]  # the trail of the whole text, valid when all tokens were seen
    trail: LaterTrail = field(init=False)

    def __post_init__(self) -> None:
        self.trail = LaterTrail(self.begun.tokens)

    @property
    def seen(self) -> int:
        return self.trail.length

    @property
    def row(self) -> Row:
        """What is known of its tokens that were seen so far."""
        return self.begun.model_copy(update={"tokens": self.trail.made()})

    @property
    def ids(self) -> memoryview | TokenFile:
        """int32, of a row whose tokens are all here."""
        assert not isinstance(self.tokens, Tail)
        return ids(self.tokens)

    def jump(self, seen: LaterTrail) -> None:
        """So many of the row's tokens are in a state that was found."""
        self.trail = seen

    def advance(self, seen: int) -> None:
        """Note that `seen` of the row's tokens were seen."""
        self.trail = LaterTrail(self.trail, ids(self.tokens, slice(self.seen, seen)))

    def known(self, text: Text, *, complete: bool) -> Row:
        """The row's entry in a state. complete: all rows of that state were seen to their ends."""
        return Row(tokens=self.trail.made(), text=self.text(), end=self.end(text)) if complete else self.row

    def end(self, text: Text) -> TextEnd:
        """Where the text ends when all tokens were seen."""
        return text.end_of(self.given, self.begun.end if self.begun.appended_to else None)


def unchanged(state: RecurrentState) -> Going:
    """The row of a one-row state to which nothing is added."""
    (row,) = state.rows
    return Going(Tail(torch.empty(0, dtype=torch.int32), row.tokens.length), row, memoryview(b""), lambda: row.text)


def prompts(
    rows: Sequence[Tensor | Stored], texts: Sequence[str | TextFile | None], state: RecurrentState | None
) -> list[Going]:
    """Whole prompts. rows: their tokens. texts: their texts, None for token ids. Raises StateError."""
    if state is not None and state.batch != len(rows):
        raise StateError(
            f"{state.name} has {state.batch} prompts, but {len(rows)} were given; to ask one state several questions, "
            "give only the new text, with `append`"
        )
    going = []
    for b, (tokens, text) in enumerate(zip(rows, texts, strict=True)):
        known = NEW if state is None else state.rows[b]
        if state is not None:
            which = f"prompt {b + 1}" if len(rows) > 1 else "the prompt"
            _require_beginning(which, ids(tokens), text, known, state)
        trail = _with_text(TextTrail(), text)
        if state is not None:
            known = Row(tokens=known.tokens, text=known.text, end=known.end, scored=known.scored)
        going.append(Going(tokens, known, ids(tokens), trail))
    return going


def appended(
    more: Sequence[Given], state: RecurrentState, encode: Callable[[Given, Row], Tensor | Stored]
) -> list[Going]:
    """Texts that follow the state's rows. encode: (text, its row) -> tokens."""
    if len(more) != state.batch:
        raise StateError(f"{state.name} has {state.batch} prompts, but {len(more)} texts to append were given")
    going = []
    for new, row in zip(more, state.rows, strict=True):
        begun = row.tokens if state.complete else row.appended_to
        if begun is None:
            raise StateError(
                f"{state.name} is of a prefill that was stopped after {sum(state.tokens)} tokens, and nothing can be "
                "appended to a part of a prompt; give the same prompt to go on"
            )
        tokens = encode(new, row)
        done = row.tokens.length - begun.length
        if begun.extend(ids(tokens, slice(done))).hash != row.tokens.hash:
            raise StateError(
                f"{state.name} is of a run that was stopped while it appended another text; append the same text"
            )
        text = _with_text(row.text, new if isinstance(new, str | TextFile) else None)
        tail = Tail(tokens, begun.length)
        going.append(Going(tail, row.model_copy(update={"appended_to": begun}), ids(tokens), text))
    return going


def _with_text(trail: TextTrail | None, text: str | TextFile | None) -> Callable[[], TextTrail | None]:
    """What makes the trail of a text with this one appended; None: token ids. Most are asked for by nobody."""
    if trail is None or text is None:
        return lambda: None
    made = trail
    if isinstance(text, str):
        return lambda: made.extend(text.encode())
    for piece in text.pieces():  # now, while it is there
        made = made.extend(piece)
    return lambda: made


def _require_beginning(
    which: str, tokens: memoryview | TokenFile, text: str | TextFile | None, known: Row, state: RecurrentState
) -> None:
    """Raise StateError unless the prompt's tokens begin with those that the state has seen."""
    apart = known.tokens.difference(tokens)
    if apart is None:
        return
    name, seen = state.name, known.tokens.length
    tokens_differ = f"its tokens differ from the state's {_between('token', *apart)}"
    if len(tokens) < seen and apart[1] == len(tokens):
        tokens_differ = f"{which} has {len(tokens)} tokens, but {name} has already seen {seen}"
    way_out = f"to go on from {name}, give only what is new after it, with `append`"
    if text is None or known.text is None:
        raise StateError(
            f"{name} is of another prompt than {which}: {tokens_differ}; give the same prompt or a longer "
            f"one, or, {way_out}"
        )
    data = text[:].encode()
    differs = known.text.difference(data)
    if differs is None:
        left = data[known.text.length :].decode()
        raise StateError(
            f"{which} goes on from the same text that {name} has seen, but the tokenizer cuts it otherwise: "
            f"{tokens_differ}; {way_out}"
            + (f" (here {len(left)} characters, beginning {left[:20]!r})" if left else " (here nothing: leave it out)")
        )
    if len(data) < known.text.length and differs[1] == len(data):
        raise StateError(
            f"{which} has {len(tokens)} tokens, but {name} has already seen {seen}; give the same prompt or a longer "
            f"one, or, {way_out}"
        )
    first, last = (data.count(b"\n", 0, place) + 1 for place in differs)
    lines = f"line {first}" if first == last else f"lines {first} to {last}"
    raise StateError(
        f"{name}, of {seen} tokens, is of another prompt than {which}: "
        f"its text differs {_between('byte', *differs)} ({lines})"
        f"; give the same prompt or a longer one, or, {way_out}"
    )


def _between(unit: str, alike: int, apart: int) -> str:
    """The place of the first difference: `alike` units agree, and it is within the next `apart - alike`."""
    return f"at {unit} {alike + 1}" if apart - alike <= 1 else f"between {unit} {alike + 1} and {apart}"
