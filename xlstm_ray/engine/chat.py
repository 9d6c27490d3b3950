"""A conversation: a state that grows turn by turn, and can be forked, saved and gone on from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_ray.errors import UsageError
from xlstm_ray.state import RecurrentState

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine


class Chat:
    """Keeps the state between turns where it is, on the device: nothing is computed twice.

    state: to begin from; it stays as it is. sampling: of all answers, fields of `Sampling` by name. Texts are taken as
    they are: a model's roles and turns are the caller's to write.
    """

    def __init__(
        self, engine: "Engine", *, state: RecurrentState | None = None, sampling: Mapping[str, Any] | None = None
    ):
        self._engine, self._state, self._sampling = engine, state, dict(sampling or {})

    @property
    def state(self) -> RecurrentState:
        """The state after all that was said. Raises UsageError before anything was."""
        if self._state is None:
            raise UsageError("nothing has been said in this conversation yet, so it has no state")
        return self._state

    def say(self, text: str, **sampling: Any) -> Iterator[str]:
        """Say something, and iterate over the pieces of the answer.

        sampling: of this answer, over the conversation's. An answer that is not heard to its end is part of the
        conversation as far as it was made.
        """
        given = {"prompt": text} if self._state is None else {"append": text, "state": self._state}
        generation = self._engine.generate(**given, sampling={**self._sampling, **sampling}, last=False)
        try:
            yield from generation
        finally:
            self._state = generation.state()

    def fork(self) -> "Chat":
        """Another conversation that goes on from here: both stay what they are alone."""
        return Chat(self._engine, state=self._state, sampling=self._sampling)

    def save(self, path: str | Path, *, overwrite: bool = False) -> str:
        """Write its state, as `--state-out` does; returns the digest."""
        return self.state.save(path, overwrite=overwrite)
