"""A conversation: a state that grows turn by turn, and can be forked, saved and resumed."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xlstm_ray.engine.generation import Generation
from xlstm_ray.errors import UsageError
from xlstm_ray.state import RecurrentState


class Chat:
    """Keeps the state on the device between turns: nothing is computed twice.

    generate: Engine.generate. state: to begin from; it does not change. sampling: fields of `Sampling` by name, for all
    answers. Texts are not changed: the caller writes a model's marks of roles and turns.
    """

    def __init__(
        self,
        generate: Callable[..., Generation],
        *,
        state: RecurrentState | None = None,
        sampling: Mapping[str, Any] | None = None,
    ):
        self._generate, self._sampling = generate, dict(sampling or {})
        self._at: RecurrentState | Generation | None = state  # an answer, until it was read to its end

    @property
    def state(self) -> RecurrentState:
        """The state after everything that was said. Raises UsageError before the first turn."""
        if self._at is None:
            raise UsageError("nothing has been said in this conversation yet, so it has no state")
        return self._at.state() if isinstance(self._at, Generation) else self._at

    def say(self, text: str, **sampling: Any) -> Iterator[str]:
        """Say something, which is read at once, and iterate over the pieces of the answer.

        sampling: for this answer, over the conversation's. An answer that is not read to its end is part of the
        conversation as far as it was made.
        """
        given = {"prompt": text} if self._at is None else {"append": text, "state": self.state}
        self._at = answer = self._generate(**given, sampling={**self._sampling, **sampling}, last=False)
        return self._pieces(answer)

    def _pieces(self, answer: Generation) -> Iterator[str]:
        try:
            yield from answer
        finally:
            if self._at is answer:  # else something more was said before it was read to its end
                self._at = answer.state()

    def fork(self) -> "Chat":
        """Another conversation that goes on from here; they do not affect each other."""
        return Chat(self._generate, state=None if self._at is None else self.state, sampling=self._sampling)

    def save(self, path: str | Path, *, overwrite: bool = False) -> str:
        """Write its state, like `--state-out`; returns the digest."""
        return self.state.save(path, overwrite=overwrite)
