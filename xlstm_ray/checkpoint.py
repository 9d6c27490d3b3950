"""safetensors -> BlockWeights, tensor by tensor, sliced to a stage and a band while reading. Strict, never pickle.

The layout is Hugging Face's, as NX-AI/xLSTM-7b is published and as transformers writes it, weight modes single and
fused; sLSTM blocks have the names of published models. One table renames. Every tensor that the configuration asks for
must be there with its shape, and no other tensor.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from xxhash import xxh3_128_digest

from xlstm_ray import digests, tensors
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError, one_line
from xlstm_ray.files import MIB
from xlstm_ray.headers import DTYPES, INDEX_FILE, check, locate, read_digests, read_header
from xlstm_ray.kernels.quantized import Quantized, dequantized, unpacked
from xlstm_ray.layout import Shard
from xlstm_ray.model import BlockWeights, EndWeights, SlstmWeights, Weights
from xlstm_ray.tensors import EMBEDDING, HEAD, OUT_NORM, SCALE, SLSTM_GATES, ZERO, bytes_of, is_quantized, projections

UNIT = MIB  # bytes of a tensor (whole rows) that have one digest, so that a band checks only its own rows
DIGEST = 16  # bytes
Make = Callable[[Weights], Any]


class Stored(NamedTuple):
    """A tensor as the files have it, to the bit: `units` are digests of its rows, each of UNIT bytes or one row."""

    shape: tuple[int, ...]
    dtype: str
    units: bytes


class Checkpoint:
    """A model directory. Its headers are read and checked against the configuration; its weights are read later.

    If the files have an out norm, it is applied: transformers applies it whatever add_out_norm says. It may be missing
    only if add_out_norm is false. If the files have a head, it is used. It may be missing only if tie_word_embeddings
    is true.

    Digests are computed while weights are read. expected: the digests (`stored`) of another process, maybe on another
    machine; reading a tensor that differs raises CheckpointError.
    """

    def __init__(self, directory: Path, config: ModelConfig, expected: Mapping[str, Stored] | None = None):
        self.config, self.directory = config, directory
        self._files = locate(directory)
        self._header: dict[str, tuple[list[int], str]] = {}
        self._noted: dict[str, bytes] = {}
        for path in sorted(set(self._files.values())):
            for name, entry in read_header(path).items():
                if name not in self._files or self._files[name] != path:
                    raise CheckpointError(f"{path}: tensor {name!r} is in it, but {INDEX_FILE} does not say so")
                self._header[name] = entry
            self._noted |= read_digests(path)
        self._whole = check(directory, config, self._files, self._header)  # shapes, before quantization
        self._expected = expected
        if expected is not None and {n: (list(e.shape), e.dtype) for n, e in expected.items()} != self._header:
            raise self._another()
        self._units: dict[str, list[bytes | None]] = {name: [None] * self._rows(name)[1] for name in self._header}
        self._stats = {path: digests.stat(path) for path in set(self._files.values())}
        self._beside: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None
        self._kept_already = expected is not None or self._recall()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to run in: config.json's, or that of most weight bytes if it is wider or config.json has none.

        Most bytes count, so one tensor that is stored in a narrower dtype does not narrow the others.
        """
        if self.config.quantization is not None:  # what is stored in float32 is so for its precision
            return getattr(torch, self.config.dtype or "bfloat16")
        stored: Counter[torch.dtype] = Counter()
        for shape, name in self._header.values():
            stored[DTYPES[name]] += torch.Size(shape).numel() * DTYPES[name].itemsize
        most = max(stored, key=lambda dtype: (stored[dtype], dtype.itemsize))
        asked = getattr(torch, self.config.dtype) if self.config.dtype else most
        return max(asked, most, key=lambda dtype: dtype.itemsize)

    def weight_bytes(self, dtype: torch.dtype, *, float8: bool = False) -> int:
        """Bytes of all weights with matrices and norms in `dtype`. Gates and sLSTM layers are float32.

        float8: the large matrices of blocks are quantized.
        """
        shapes = self.shapes.items()
        return sum(bytes_of(self.config, name, shape, dtype, float8=float8) for name, shape in shapes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: tuple(shape) for name, (shape, _) in self._header.items()}

    @property
    def largest_tensor_bytes(self) -> int:
        """What reading takes at most beside the weights that it makes: a tensor, which is mapped, or integers."""
        stored = max(torch.Size(shape).numel() * DTYPES[dtype].itemsize for shape, dtype in self._header.values())
        return max(stored, tensors.reading_bytes(self.config, self._whole))

    @property
    def files(self) -> list[Path]:
        """The weights' files."""
        return sorted(self._stats)

    def read(self, name: str) -> Tensor:
        """A whole tensor as it is stored, a view of its mapped file. Raises CheckpointError if it is not finite."""
        return self._finite(self._read(name), name)

    def fingerprint(self) -> str:
        """The model's identity: 32 hex digits over its configuration, all bytes of its weights and its tokenizer file.

        It does not depend on how the weights are spread over files. Weights that were not read yet are read now.
        """
        # Left out if empty, so that a missing key and an empty one name the same model.
        without = {name for name in ("slstm_at", "quantization") if not getattr(self.config, name)}
        digest = hashlib.sha256(self.config.model_dump_json(exclude=without).encode())
        for name, tensor in sorted(self.stored().items()):
            digest.update(json.dumps([name, tensor.shape, tensor.dtype]).encode() + tensor.units)
        tokenizer = self.directory / "tokenizer.json"
        if tokenizer.is_file():
            digest.update(b"tokenizer" + hashlib.sha256(tokenizer.read_bytes()).digest())
        return digest.hexdigest()[:32]

    def stored(self) -> dict[str, Stored]:
        """The digests of every stored tensor. Weights that were not read yet are read now; digests are kept on disk."""
        missing = [name for name, units in self._units.items() if None in units]
        if missing:
            with ThreadPoolExecutor(4) as pool:  # disks serve several reads at once, and hashing releases the GIL
                list(pool.map(self._read, missing))
        if not self._kept_already:
            self._kept_already = True
            self._remember()
        return {
            name: Stored(tuple(shape), dtype, b"".join(unit or b"" for unit in self._units[name]))
            for name, (shape, dtype) in self._header.items()
        }

    def load(
        self, shard: Shard, *, dtype: torch.dtype, device: torch.device, made: Make = lambda weights: weights
    ) -> tuple[list[Any], EndWeights]:
        """Read this band's slices onto `device`: matrices and norms in `dtype`, gates in float32.

        made: what becomes of a block's weights, as soon as they are read.
        A file is opened for one tensor at a time, so no more than that tensor is mapped. A second thread computes the
        digests during the copies; without it, loading takes half as long again on a fast GPU.
        """
        with ThreadPoolExecutor(1, "digests") as self._beside:
            try:
                leads = shard.heads.start == 0  # the first band has what is not split: sums' biases, embedding, head
                blocks = [made(self._block(n, shard, dtype, device, leads)) for n in shard.blocks]
                ends = self._ends(shard, dtype, device, leads)
                self._settle()
            finally:
                self._beside = None
        return blocks, ends

    def _ends(self, shard: Shard, dtype: torch.dtype, device: torch.device, leads: bool) -> EndWeights:
        embedding = out_norm = head = None
        last = leads and shard.blocks.stop == self.config.num_blocks
        tied = HEAD not in self._header
        if leads and shard.blocks.start == 0 or last and tied:
            embedding = self._matrix([(EMBEDDING, slice(None))], slice(None), dtype, device)
        if last:
            head = embedding if tied else self._matrix([(HEAD, slice(None))], slice(None), dtype, device)
            out_norm = self._tensor(OUT_NORM, self._norms(dtype), device) if OUT_NORM in self._header else None
        return EndWeights(embedding, out_norm, head)

    def _block(self, n: int, shard: Shard, dtype: torch.dtype, device: torch.device, leads: bool) -> Weights:
        config, at, table = self.config, f"backbone.blocks.{n}.", projections(self.config)
        qk = slice(shard.heads.start * config.dhqk, shard.heads.stop * config.dhqk)
        v = slice(shard.heads.start * config.dhhv, shard.heads.stop * config.dhhv)
        nh, ffn = slice(shard.heads.start, shard.heads.stop), slice(shard.ffn.start, shard.ffn.stop)
        everything, norms = slice(None), self._norms(dtype)
        band_rows = {"q": qk, "k": qk, "v": v, "o": v, "i": nh, "f": nh, "gate": ffn, "up": ffn}

        def stack(parts: str, kind: str, to: torch.dtype) -> Tensor:
            """The band's rows of several projections, stacked; each is read directly into its place."""
            rows = [band_rows[part] for part in parts.split()]
            count = sum(r.stop - r.start for r in rows)
            shape = (count, config.hidden_size) if kind == "weight" else (count,)
            out, filled = torch.empty(shape, dtype=to, device=device), 0
            for part, r in zip(parts.split(), rows, strict=True):
                name, first, _ = table[part]
                size = r.stop - r.start
                full_name, rows_of_part = f"{at}{name}.{kind}", out[filled : filled + size]
                rows_of_part.copy_(self._read(full_name, slice(first + r.start, first + r.stop)))
                self._finite(rows_of_part, full_name)
                filled += size
            return out

        def matrix(parts: str) -> Tensor | Quantized:
            if config.quantization is None:
                return stack(parts, "weight", dtype)
            rows = [(table[part][0], table[part][1], band_rows[part]) for part in parts.split()]
            return self._matrix(
                [(f"{at}{name}.weight", slice(first + r.start, first + r.stop)) for name, first, r in rows],
                everything,
                dtype,
                device,
            )

        def bias(parts: str) -> Tensor | None:
            return stack(parts, "bias", norms) if config.use_bias else None

        def one(name: str, *where: slice) -> Tensor:
            return self._tensor(at + name, norms, device, *where)

        def columns(name: str, where: slice) -> Tensor | Quantized:
            return self._matrix([(at + name, everything)], where, dtype, device)

        def maybe(name: str, *where: slice, when: bool = True) -> Tensor | None:
            return one(name, *where) if config.use_bias and when else None

        ffn_weights: dict[str, Any] = {
            "ffn_norm": one("norm_ffn.weight"),
            "ffn_norm_bias": maybe("norm_ffn.bias"),
            "up": matrix("gate up"),
            "up_bias": bias("gate up"),
            "down": columns("ffn.proj_down.weight", ffn),
            "down_bias": maybe("ffn.proj_down.bias", when=leads),
        }
        if n in config.slstm_at:
            dh = config.dh

            def exact(name: str, *where: slice) -> Tensor:
                return self._tensor(f"{at}slstm_layer.{name}", torch.float32, device, *where)

            gates = torch.empty(len(shard.heads), 4, dh, dh, device=device)
            for gate, name in enumerate(SLSTM_GATES):
                gates[:, gate] = exact(f"{name}.weight", nh)
            return SlstmWeights(
                mixer_norm=one("norm_slstm.weight"),
                mixer_norm_bias=maybe("norm_slstm.bias"),
                gates=gates.flatten(1, 2),
                recurrent=exact("slstm_cell._recurrent_kernel_", nh),
                gates_bias=exact("slstm_cell._bias_", slice(4 * dh * nh.start, 4 * dh * nh.stop)).view(-1, 4 * dh),
                head_norm=1 + exact("group_norm.weight", slice(dh * nh.start, dh * nh.stop)),
                channel=torch.tensor(dh * nh.start, device=device),
                **ffn_weights,
            )
        return BlockWeights(
            mixer_norm=one("norm_mlstm.weight"),
            mixer_norm_bias=maybe("norm_mlstm.bias"),
            qkvo=matrix("q k v o"),
            qkvo_bias=bias("q k v o"),
            gates=stack("i f", "weight", torch.float32),
            gates_bias=stack("i f", "bias", torch.float32),
            head_norm=one("mlstm_layer.multihead_norm.weight", v),
            head_norm_bias=maybe("mlstm_layer.multihead_norm.bias", v),
            out=columns("mlstm_layer.out_proj.weight", v),
            out_bias=maybe("mlstm_layer.out_proj.bias", when=leads),
            **ffn_weights,
        )

    def _norms(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of norms and biases: float32 beside integers, where they are little."""
        return dtype if self.config.quantization is None else torch.float32

    def _matrix(
        self, parts: Sequence[tuple[str, slice]], columns: slice, dtype: torch.dtype, device: torch.device
    ) -> Tensor | Quantized:
        """Rows of several matrices, stacked, and a range of their columns; integers stay integers, but in float64."""
        if not is_quantized(self.config, parts[0][0]):
            ((name, rows),) = parts
            return self._tensor(name, dtype, device, rows, columns)
        assert self.config.quantization is not None
        bits, group = self.config.quantization.bits, self.config.quantization.group_size
        start, stop, _ = columns.indices(self._whole[parts[0][0]][1])
        groups = slice(start // group, -(-stop // group))  # the others' columns in the first and last are times 0
        bytes_ = slice(groups.start * group * bits // 8, groups.stop * group * bits // 8)
        read = [unpacked(self._read(name, rows, bytes_), bits=bits, group=group) for name, rows in parts]
        values = torch.cat(read) if len(read) > 1 else read[0]
        del read

        def of_groups(kind: str) -> Tensor:
            host = torch.device("cpu")
            return torch.cat([self._tensor(name + kind, dtype, host, rows, groups) for name, rows in parts])

        zero = of_groups(ZERO) if bits == 4 else None
        before = start - groups.start * group
        if dtype == torch.float64:  # for references
            return dequantized(values, of_groups(SCALE), zero)[:, before : before + stop - start].to(device)
        packed = device.type == "cpu" and parts[0][0] not in (EMBEDDING, HEAD)
        return Quantized.make(values, of_groups(SCALE), zero, before=before, packed=packed).to(device)

    def _tensor(self, name: str, dtype: torch.dtype, device: torch.device, *where: slice) -> Tensor:
        part = self._read(name, *where)
        out = torch.empty(part.shape, dtype=dtype, device=device)
        return self._finite(out.copy_(part), name)

    def _finite(self, tensor: Tensor, name: str) -> Tensor:
        """Return the tensor. Raises CheckpointError for NaN or infinity: they would spread to every result."""
        # A sum needs one pass and no temporary. It may overflow though all values are finite, hence the second check.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{self._files[name]}: tensor {name} holds values that are not finite in {tensor.dtype}"
            )
        return tensor

    def _read(self, name: str, *where: slice) -> Tensor:
        """A slice of a tensor, as a view of the mapped file. Digests of its rows are computed or checked."""
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                whole = file.get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {one_line(err)}") from None
        part = whole[where] if where else whole
        rows, units = self._rows(name)[0], self._units[name]
        first, last, _ = (where[0] if where else slice(None)).indices(len(whole))
        missing = [n for n in range(first // rows, -(-last // rows)) if units[n] is None]
        if missing and self._beside is not None:
            self._settle()  # only one at a time: its tensor stays mapped
            self._under_way = self._beside.submit(self._digest, name, whole, missing)
        elif missing:
            self._digest(name, whole, missing)
        return part

    def _digest(self, name: str, whole: Tensor, missing: Sequence[int]) -> None:
        """Compute or check the digests of these units of a tensor."""
        rows, units = self._rows(name)[0], self._units[name]
        for n in missing:
            units[n] = _digest_of(whole[n * rows : (n + 1) * rows])
            noted = self._noted.get(name)
            if noted is not None and units[n] != noted[n * DIGEST : (n + 1) * DIGEST]:
                raise CheckpointError(
                    f"{self._files[name]}: tensor {name} is not as it was written; the file is damaged: make it again, "
                    "or copy it again"
                )
            if self._expected is not None and units[n] != self._expected[name].units[n * DIGEST : (n + 1) * DIGEST]:
                raise self._another()

    def _settle(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _rows(self, name: str) -> tuple[int, int]:
        """For a tensor: rows per unit, and number of units."""
        shape, dtype = self._header[name]
        rows = _rows_of_unit(torch.Size(shape), DTYPES[dtype])
        return rows, -(-shape[0] // rows)

    def _another(self) -> CheckpointError:
        return CheckpointError(f"{self.directory}: node {os.uname().nodename} has another model there than the driver")

    def _recall(self) -> bool:
        """Load the digests that were kept for these files; returns whether they are complete."""
        everything = True
        for path, now in self._stats.items():
            if now[0] < digests.KEPT_FROM:
                continue
            units, names = digests.recall(path, now), self._names(path)
            if all(len(units.get(name, b"")) == DIGEST * len(self._units[name]) for name in names):
                for name in names:
                    self._units[name] = [units[name][at : at + DIGEST] for at in range(0, len(units[name]), DIGEST)]
            else:
                everything = False
        return everything

    def _remember(self) -> None:
        for path, before in self._stats.items():
            digests.remember(
                path, before, {name: b"".join(u or b"" for u in self._units[name]) for name in self._names(path)}
            )

    def _names(self, path: Path) -> list[str]:
        return [name for name, where in self._files.items() if where == path]


def digests_of(tensor: Tensor) -> bytes:
    """The digests of a stored tensor, as `Stored.units`."""
    return b"".join(map(_digest_of, tensor.split(_rows_of_unit(tensor.shape, tensor.dtype))))


def _digest_of(rows: Tensor) -> bytes:
    unit: Any = rows.contiguous().view(torch.uint8).numpy()
    return xxh3_128_digest(unit)


def _rows_of_unit(shape: torch.Size, dtype: torch.dtype) -> int:
    return max(1, UNIT // (shape[1:].numel() * dtype.itemsize))
