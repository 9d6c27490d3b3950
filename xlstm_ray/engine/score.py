"""The likelihood of a text of any length: sums that are made while it is read."""

import math
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from xlstm_ray.engine.core import Core
from xlstm_ray.engine.driver import Each, Progress
from xlstm_ray.engine.prefill import Asked, Prefill
from xlstm_ray.engine.result import PrefillResult
from xlstm_ray.engine.resume import prompts
from xlstm_ray.engine.tokens import Stored
from xlstm_ray.errors import StateError, UsageError
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.ondisk import PIECE, TextFile, TokenFile


@dataclass(frozen=True)
class Score:
    """Of a text, or of several together (`+`): the sum of its tokens' log-probabilities in nats, and its sizes.

    A text's words are what stands between white space; its bytes are those of UTF-8. result: of the run; if that was
    stopped, the sums are of what was read, and the result's state goes on.
    """

    logprob: float
    tokens: int  # those that were scored
    words: int
    bytes: int
    result: PrefillResult | None = field(default=None, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        return self.result is None or self.result.complete

    @property
    def bits_per_byte(self) -> float:
        return -self.logprob / math.log(2) / self.bytes

    def perplexity(self, units: int) -> float | None:
        """Of each of so many units, for instance `tokens`; None: there are none, or it is beyond all numbers."""
        try:
            return math.exp(-self.logprob / units) if units else None
        except OverflowError:
            return None

    def to_json(self) -> dict[str, int | float | None]:
        """All figures, in nats and bits."""
        return {
            "log_likelihood": self.logprob,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "token_perplexity": self.perplexity(self.tokens),
            "word_perplexity": self.perplexity(self.words),
            "byte_perplexity": self.perplexity(self.bytes),
            "bits_per_byte": self.bits_per_byte,
        }

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.logprob + other.logprob,
            self.tokens + other.tokens,
            self.words + other.words,
            self.bytes + other.bytes,
        )


def score(
    core: Core,
    text: str | TextFile,
    *,
    state: RecurrentState | None = None,
    any_numerics: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_snapshot: Callable[[RecurrentState], None] | None = None,
) -> Score:
    """The likelihood of a text, from its first token on: the model's begin token, or else its end token, comes before.

    state: of a run of this that was stopped: it goes on, to the same sums. Any other state is what the text follows.
    The other arguments are those of Engine.prefill. Sums are in float64, in the order of the tokens; each logarithm is
    computed in float32. A TextFile costs no memory, of a str the tokens are held. Raises StateError, UsageError.
    """
    if not len(text):
        raise UsageError("the text is empty; a score needs at least one token")
    core.on_phase("cutting the prompt into tokens")
    if state is not None:
        core.check(state, any_numerics=any_numerics)
        _require_sums(state)
    if state is not None and (state.complete or state.rows[0].appended_to is not None):
        going, state = core.going_on(None, text, state, any_numerics=any_numerics)
    else:
        going = prompts([_begun(core, text)], [None], state)
    words, size = _sizes(text)
    asked = Asked(Each(sums=True), on_progress, should_stop=should_stop, on_snapshot=on_snapshot)
    result = Prefill(core, going, state, asked, encode_s=0.0).run()
    (scored,) = result.scored
    assert scored is not None
    return Score(scored.logprob, scored.tokens, words, size, result)


def _begun(core: Core, text: str | TextFile) -> Tensor | Stored:
    """The text's tokens, after the begin token."""
    config = core.plan.config
    begin = next((t for t in (config.bos_token_id, *config.eos_token_id) if t is not None), config.vocab_size)
    if isinstance(text, str):
        tokens = core.text.tokens(text)
        if begin < config.vocab_size and tokens[0] != begin:
            tokens = torch.cat([torch.tensor([begin], dtype=tokens.dtype), tokens])
        return tokens
    file = core.text.on_disk(text)
    if begin < config.vocab_size and file[0] != begin:
        file = TokenFile.of(chain([array("i", [begin])], file.pieces()), text.folder)
    return Stored(file)


def _sizes(text: str | TextFile) -> tuple[int, int]:
    """Words and bytes."""
    words, size, within = 0, 0, False
    for start in range(0, len(text), PIECE):
        piece = text[start : start + PIECE]
        words += sum(1 for _ in re.finditer(r"\S+", piece)) - (within and not piece[0].isspace())
        within, size = not piece[-1].isspace(), size + len(piece.encode())
    return words, size


def _require_sums(state: RecurrentState) -> None:
    """Raise StateError for a state that a text cannot be scored from."""
    if state.batch > 1:
        raise StateError(f"{state.name} has {state.batch} prompts; a text is scored after one")
    (row,) = state.rows
    if not state.complete and (row.scored is None or row.scored.seen != row.tokens.length):
        raise StateError(
            f"{state.name} is of a prefill that was stopped, and has no sums of log-probabilities; score the text from "
            "its beginning, or end that prefill first"
        )
