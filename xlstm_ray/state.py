"""RecurrentState: what remains of a prompt of any length. Saved as one safetensors file, which is checked when read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from operator import not_
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from xxhash import xxh3_128

from xlstm_ray.config import ModelConfig
from xlstm_ray.directories import cache_dir
from xlstm_ray.errors import OutputError, StateError, one_line
from xlstm_ray.files import STATE, require_replaceable, write_whole
from xlstm_ray.sampling import Sampling
from xlstm_ray.text.history import EMPTY_PROMPT, Count, Place, Row, TokenTrail, extend_prompt_hash

__all__ = ["EMPTY_PROMPT", "FORMAT", "Numerics", "RecurrentState", "extend_prompt_hash"]

SAMPLED = "xlstm-ray state 1"  # its fingerprint covered only a sample of the weights

FORMAT = "xlstm-ray state 5"
Piece = bytes | memoryview
KEPT = 4  # states of interrupted runs to keep, one for each model


class Numerics(BaseModel):
    """What decides the bits of a result besides model and prompt: the same numerics give a prompt the same bits."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kernel: Annotated[str, Field(pattern="^(compiled_chunks|compiled_steps|triton_chunks|native)$")]
    tile_size: Annotated[int, Field(gt=0, le=1 << 20)]
    chunk_size: Annotated[int, Field(gt=0, le=1 << 16)]
    heads_per_band: Annotated[int, Field(gt=0)]
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float8)$")]
    mixed: bool = False  # part of the prompt was computed with other sizes or numerics: the bits are this run's own
    # Torch was told to compile nothing: the kernel's functions ran as they are. False is not written, as before.
    eager: Annotated[bool, Field(exclude_if=not_)] = False

    def goes_on_as(self, other: "Numerics") -> bool:
        """Whether a state of these numerics can go on with `other`: they are equal, or its sizes are mixed already."""
        sizes = {"tile_size": other.tile_size, "chunk_size": other.chunk_size, "mixed": other.mixed}
        return (self.model_copy(update=sizes) if self.mixed else self) == other

    def differences(self, other: "Numerics") -> str:
        """`name mine, not theirs` for every field that differs."""
        names = [name for name in type(self).model_fields if name != "mixed"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return "; ".join(f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs)


class _Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: str
    model: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    numerics: Numerics
    tokens: Annotated[list[Count], Field(min_length=1, max_length=1 << 16)]
    prompt_hash: list[Annotated[str, Field(pattern="^[0-9a-f]{32}$")]]
    rows: list[Row]
    sampling: Sampling | None
    complete: bool
    begun: list[Count] | None = None
    place: Place | None = None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # or else `sum`
    sum: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None


class Hasher(Protocol):
    def update(self, data: Any, /) -> object: ...
    def hexdigest(self) -> str: ...


class Elsewhere(Protocol):
    """The place of a state's tensors until somebody asks for them."""

    def bring(self) -> dict[str, Tensor]:
        """All tensors but the logits, on the CPU. Raises GridLost."""

    def pick(self, rows: Sequence[int]) -> "Elsewhere":
        """Some of the rows."""


class RecurrentState:
    """The state of B prompts after some of their tokens.

    tensors: `blocks.N.C` (B, NH, K, V), `blocks.N.n` (B, NH, K), `blocks.N.m` (B, NH, 1) of an mLSTM block,
    `blocks.N.h`, `.c`, `.n`, `.m` (B, NH, DH) of an sLSTM block, and `logits` (B, vocabulary) of the last token
    consumed; all float32, on the CPU. For each row, `tokens` and `prompt_hash` say how many tokens it has seen, and
    which (a row without tokens is all zeros), and `rows` has what is known of their text. `complete` is false if the
    prefill was stopped before its end; then `begun` has each row's number of tokens before that prefill, which decides
    the groups of rows. `sampling`: parameters of the last answer, for the next one. `name`: its name in errors.
    `elsewhere`: where the other tensors are while `tensors` has only the logits. `place`: the place of a state that an
    engine keeps for later prompts.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        tokens: Sequence[int],
        prompt_hash: Sequence[str],
        model: str,
        numerics: Numerics,
        complete: bool,
        begun: Sequence[int] | None = None,
        rows: Sequence[Row] | None = None,
        sampling: Sampling | None = None,
        name: str = "the state",
        elsewhere: Elsewhere | None = None,
        place: Place | None = None,
    ):
        self._tensors, self.tokens, self.prompt_hash = tensors, list(tokens), list(prompt_hash)
        self.elsewhere, self._brought = elsewhere, elsewhere is None
        if rows is None:  # only tokens are known
            known = zip(self.tokens, self.prompt_hash, strict=True)
            rows = [Row(tokens=TokenTrail(length=n, hash=h, step=max(n, 1))) for n, h in known]
        self.rows, self.sampling = list(rows), sampling
        self.model, self.numerics, self.complete, self.name = model, numerics, complete, name
        self.begun, self.place = None if begun is None else list(begun), place

    @property
    def batch(self) -> int:
        return len(self.tokens)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors. If an engine's workers have them, they are fetched on the first access."""
        if not self._brought and self.elsewhere is not None:
            self._tensors = {**self.elsewhere.bring(), **self._tensors}
            self._brought = True
        return self._tensors

    @property
    def logits(self) -> Tensor:
        """The logits of each row's last token: (B, vocabulary) float32, on the CPU."""
        return (self._tensors if "logits" in self._tensors else self.tensors)["logits"]

    def digest(self) -> str:
        """sha256 of all tensors, token counts and prompt hashes: equal digests are equal states, to the bit."""
        return self._hashed(hashlib.sha256())

    def checksum(self) -> str:
        """Of the same, at the speed of memory: shows damage."""
        return self._hashed(xxh3_128())

    def _hashed(self, total: "Hasher") -> str:
        total.update(json.dumps([self.tokens, self.prompt_hash]).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            total.update(json.dumps([name, list(tensor.shape)]).encode())
            total.update(tensor.view(torch.uint8).numpy().data)
        return total.hexdigest()

    def row(self, b: int) -> "RecurrentState":
        """The state of one prompt of a batch."""
        return self._of_rows([b], {name: tensor[b : b + 1].clone() for name, tensor in self._tensors.items()})

    def spread(self, batch: int) -> "RecurrentState":
        """Repeat the state of one prompt for `batch` rows, without copying tensors."""
        assert self.batch == 1
        tensors = {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self._tensors.items()}
        return self._of_rows([0] * batch, tensors)

    def _of_rows(self, rows: list[int], tensors: dict[str, Tensor]) -> "RecurrentState":
        state = RecurrentState(
            tensors,
            tokens=[self.tokens[b] for b in rows],
            prompt_hash=[self.prompt_hash[b] for b in rows],
            model=self.model,
            numerics=self.numerics,
            complete=self.complete,
            begun=None if self.begun is None else [self.begun[b] for b in rows],
            rows=[self.rows[b] for b in rows],
            sampling=self.sampling,
            name=self.name,
            elsewhere=self.elsewhere and self.elsewhere.pick(rows),
        )
        state._brought = self._brought
        return state

    def save(self, path: str | Path, *, overwrite: bool = False, lasting: bool = True) -> str:
        """Write the file whole or not at all (temporary file, fsync, rename); returns the digest.

        lasting: as in write_whole. If False, the file has a checksum in place of the digest, and that is returned.
        A state file is replaced, any other file only with `overwrite`. A link is never followed. Raises StateError if
        the file may not be replaced or cannot be written.
        """
        path = Path(path)
        try:
            require_replaceable(path, STATE, overwrite=overwrite)
        except OutputError as err:
            raise StateError(str(err)) from None
        check = {"digest": self.digest()} if lasting else {"sum": self.checksum()}
        try:
            write_whole(path, self._file(check), lasting=lasting)
        except OSError as err:
            raise StateError(f"{path}: the state cannot be written ({err.strerror})") from None
        (made,) = check.values()
        return made

    def to_pieces(self) -> list[Piece]:
        """What `save` writes where it is to last, without a copy of the tensors."""
        return self._file({"digest": self.digest()})

    def to_bytes(self) -> bytes:
        """What `save` writes where it need not last."""
        return b"".join(self._file({"sum": self.checksum()}))

    def _file(self, check: Mapping[str, str]) -> list[Piece]:
        """A file's bytes in pieces. check: `digest` or `sum`."""
        metadata = _Metadata(
            format=FORMAT,
            model=self.model,
            numerics=self.numerics,
            tokens=self.tokens,
            prompt_hash=self.prompt_hash,
            rows=self.rows,
            sampling=self.sampling,
            complete=self.complete,
            begun=self.begun,
            place=self.place,
            **check,
        )
        there = {*check, *(["place"] if self.place else [])}
        text = metadata.model_dump_json(exclude={"digest", "sum", "place"} - there)
        return pieces(self.tensors, {"xlstm_ray": text, "check": hashlib.sha256(text.encode()).hexdigest()})

    def keep(self) -> Path:
        """Save it in the cache directory. Replaces the last one of this model, and removes the oldest of other models.

        Raises StateError if the file cannot be written.
        """
        folder = cache_dir() / "states"
        path = folder / f"{self.model}.state"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.save(path)
            for old in sorted(folder.glob("*.state"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
                old.unlink()
        except OSError as err:
            raise StateError(f"{path}: the state cannot be kept ({err.strerror})") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RecurrentState":
        """Read a state and check all of it against its digest. StateError says what is wrong, in one line."""
        path = Path(path)
        try:
            if not path.is_file():
                what = "is not a file" if path.exists() else "there is no such state file"
                raise StateError(f"{path}: {what}")
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except (SafetensorError, OSError, ValueError) as err:
            raise StateError(f"{path}: is not a whole state file: {one_line(err)}") from None
        return cls._of(tensors, header, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "RecurrentState":
        """What `to_bytes` made, checked as `load` does; name: what it is of, for errors."""
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            tensors = load(data)
        except (SafetensorError, ValueError, AttributeError, RecursionError) as err:
            raise StateError(f"{name}: is not a whole state: {one_line(err)}") from None
        return cls._of(tensors, header, name)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], header: dict[str, str], name: str) -> "RecurrentState":
        """A file's contents, checked. name: the file's, for errors."""
        for key, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not tensor.shape:
                wrong = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
                raise StateError(f"{name}: tensor {key[:80]!r} is {wrong}; tensors of a state are float32")
        text = header.get("xlstm_ray", "")
        if hashlib.sha256(text.encode()).hexdigest() != header.get("check"):
            raise StateError(f"{name}: is not a state of this program, or its header is damaged")
        if text.startswith(json.dumps({"format": SAMPLED}, separators=(",", ":"))[:-1]):
            raise StateError(
                f"{name}: was made by an earlier version, which identified models by a sample of their weights, so it "
                "may belong to another model; make it again from its prompt"
            )
        try:
            known = json.loads(text).get("format")
        except (ValueError, AttributeError, RecursionError):
            known = FORMAT  # the schema's check below names the error
        if known != FORMAT:
            raise StateError(
                f"{name}: has format {known!r}, and this program reads {FORMAT!r}; make the state again from its prompt"
            )
        try:
            metadata = _Metadata.model_validate_json(text)
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise StateError(f"{name}: the header's {where or 'text'} is wrong: {one_line(first['msg'])}") from None
        if len(metadata.prompt_hash) != len(metadata.tokens):
            raise StateError(f"{name}: has {len(metadata.tokens)} token counts but {len(metadata.prompt_hash)} hashes")
        if metadata.begun is not None and len(metadata.begun) != len(metadata.tokens):
            raise StateError(f"{name}: has {len(metadata.tokens)} token counts but {len(metadata.begun)} beginnings")
        if [(row.tokens.length, row.tokens.hash) for row in metadata.rows] != list(
            zip(metadata.tokens, metadata.prompt_hash, strict=True)
        ):
            raise StateError(f"{name}: the header's rows are not those of its tokens")
        state = cls(
            tensors,
            tokens=metadata.tokens,
            prompt_hash=metadata.prompt_hash,
            model=metadata.model,
            numerics=metadata.numerics,
            complete=metadata.complete,
            begun=metadata.begun,
            rows=metadata.rows,
            sampling=metadata.sampling,
            name=f"the state {name}",
            place=metadata.place,
        )
        made = state.checksum() if metadata.digest is None else state.digest()
        if made != (metadata.digest or metadata.sum):
            raise StateError(f"{name}: is damaged, its digest does not match its contents")
        return state

    def check(self, config: ModelConfig, model: str) -> None:
        """Raise StateError unless this state belongs to that model: checks the fingerprint and every tensor."""
        if self.model != model:
            raise StateError(
                f"{self.name} belongs to another model (fingerprint {self.model}, this model has {model}); "
                "use the model directory that it was made with"
            )
        if not self._brought:  # a worker of that model has the tensors
            return
        expected: dict[str, tuple[int, ...]] = {"logits": (self.batch, config.vocab_size)}
        for n in range(config.num_blocks):
            for name, shape in config.state_shapes(n, config.num_heads).items():
                expected[f"blocks.{n}.{name}"] = (self.batch, *shape)
        if set(expected) != set(self.tensors):
            odd = sorted(set(expected) ^ set(self.tensors))
            raise StateError(f"{self.name} does not have the model's tensors: {odd[0][:80]!r} is missing or too many")
        for name, shape in expected.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise StateError(f"{self.name}: {name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} float32")
            if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both
                raise StateError(f"{self.name}: {name} has values that are not finite; make the state again")


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Piece]:
    """A safetensors file of float32 tensors on the CPU, without a copy of them.

    safetensors' own `save` copies all of it while no other thread of Python runs: 150 ms for a state of 134 MB. The
    format: the length of the header (8 bytes, little endian), the header as JSON, the tensors in its order.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    data, end = [], 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        data.append(tensor.numpy().data.cast("B"))
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return [len(text).to_bytes(8, "little"), text, *data]
