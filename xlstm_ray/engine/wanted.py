"""The sampling of a call's rows: from the arguments, the state's last answer and the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xlstm_ray.sampling import Sampling
from xlstm_ray.sampling.params import Published, over


@dataclass(frozen=True)
class Wanted:
    """rows: each row's sampling. usual: the sampling common to all rows, which a state keeps for its next answer.

    prompts: each row's tokens before its answer, for the repetition penalty; () if it is off or they are not known.
    """

    rows: Sequence[Sampling]
    usual: Sampling
    prompts: Sequence[Sequence[int]]

    @classmethod
    def of(
        cls,
        common: Mapping[str, Any],
        own: Sequence[Mapping[str, Any]],
        *,
        before: Sampling | None,
        published: Published | None,
        vocabulary: int,
    ) -> "Wanted":
        """common: fields of all rows; own: each row's own fields, which win. Raises UsageError for wrong values."""
        given = [over(common, fields) for fields in ({}, *own)]
        usual, *rows = [Sampling.make(fields, before=before, published=published) for fields in given]
        for row in rows:
            row.require_vocabulary(vocabulary)
        return cls(rows, usual.lasting(), [()] * len(rows))

    @property
    def needs_prompts(self) -> bool:
        return any(row.repetition_penalty != 1 for row in self.rows)
