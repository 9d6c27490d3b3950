"""The sampling of a call's rows: from the arguments, the state's last answer and the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xlstm_ray.errors import UsageError
from xlstm_ray.generation_config import GenerationConfig
from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.params import DRAWING, over
from xlstm_ray.state import RecurrentState
from xlstm_ray.text.ondisk import TextFile, TokenFile
from xlstm_ray.text.prompt import Given, as_batch
from xlstm_ray.text.tokenizer import Text


@dataclass(frozen=True)
class Wanted:
    """rows: each row's sampling. usual: the sampling common to all rows, which a state keeps for its next answer.

    prompts: each row's tokens before its answer, for the repetition penalty, in any order; () if it is off or they are
    not known.
    """

    rows: Sequence[Sampling]
    usual: Sampling
    prompts: Sequence[Sequence[int]]

    @property
    def needs_prompts(self) -> bool:
        return any(row.repetition_penalty != 1 for row in self.rows)


class Samplings:
    """What an engine's callers ask for becomes `Sampling`. published: with the model. note: for people."""

    def __init__(self, published: GenerationConfig | None, text: Text, note: Callable[[str], object]):
        self._published, self._text, self._note = published, text, note
        self._told = False

    def of_rows(
        self, common: Mapping[str, Any], own: Sequence[Mapping[str, Any]], state: RecurrentState | None, batch: int
    ) -> Wanted:
        """common: fields of all rows. own: each row's own fields, which win; none, or as many as `batch`.

        Fields that are not given come from the state's last answer, else from what was published with the model. Raises
        UsageError for wrong values.
        """
        own = own or [{}] * batch
        if len(own) != batch:
            raise UsageError(f"`own_sampling` is of {len(own)} rows, and there are {batch}")
        before = state.sampling if state else None
        given = [over(common, fields) for fields in ({}, *own)]
        usual, *rows = [Sampling.make(fields, before=before, published=self._published) for fields in given]
        for row in rows:
            row.require_vocabulary(self._text.vocabulary)
        wanted = Wanted(rows, usual.lasting(), [()] * len(rows))
        asked = [fields.get(name) for fields in (common, *own) for name in DRAWING]
        self._tell(wanted.usual, asked=any(value is not None for value in (before, *asked)))
        return wanted

    def with_prompts(self, wanted: Wanted, prompt: Any, append: Any, state: RecurrentState | None) -> Wanted:
        """Add the rows' tokens, if the repetition penalty needs them. Arguments as in Engine.generate."""
        if not wanted.needs_prompts:
            return wanted
        if prompt is not None:
            known = [self._known(text) for text in as_batch(prompt)]
        else:
            self._note("`repetition_penalty` knows what is given here: a state does not hold the tokens before it")
            ends = [row.end.tokens for row in state.rows] if state else [[]]
            texts = as_batch(append) if append is not None else [()] * len(ends)
            many = max(len(texts), len(ends))
            both = zip(*(each * many if len(each) == 1 else each for each in (texts, ends)), strict=True)
            known = [self._known(text, end) if text else [] for text, end in both]
        return replace(wanted, prompts=known)

    def _known(self, given: Given, after: Sequence[int] | None = None) -> Sequence[int]:
        """Its tokens; of a file only which ones there are, since all may be many. after: as with `Text.on_disk`."""
        if isinstance(given, TextFile | TokenFile):
            return self._text.on_disk(given, after).distinct()
        return self._text.tokens(given, after).tolist()

    def _tell(self, sampling: Sampling, *, asked: bool) -> None:
        """Report once which keys of generation_config.json change an answer, and which are not supported."""
        published, told = self._published, self._told
        self._told = True
        if published is None or told:
            return
        if published.not_served:
            self._note(f"generation_config.json asks for {', '.join(published.not_served)}, which is not served here")
        repetition = sampling.repetition_penalty
        if repetition not in (1, None) and repetition == published.repetition_penalty:
            self._note(f"generation_config.json asks for repetition_penalty {repetition:g}, which is in effect")
        if sampling.temperature and not asked:
            self._note(
                f"sampling as generation_config.json says: temperature {sampling.temperature:g}, "
                f"top_k {sampling.top_k or 'off'}, top_p {sampling.top_p:g}, min_p {sampling.min_p or 'off'}; "
                "`temperature=0` is greedy"
            )
