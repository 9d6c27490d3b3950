"""safetensors -> BlockWeights, tensor by tensor, sliced to a stage and a band while reading. Strict, never pickle.

The layout is Hugging Face's, as NX-AI/xLSTM-7b is published and as transformers writes it, weight modes single and
fused; sLSTM blocks as published models name theirs. One table renames; every tensor that the configuration asks for
must be there with its shape, and no other.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xlstm_ray.config import ModelConfig, parse_json, read_json
from xlstm_ray.errors import CheckpointError, one_line
from xlstm_ray.model import Band, BlockWeights, EndWeights, SlstmWeights, Weights

EMBEDDING, OUT_NORM, HEAD = "backbone.embeddings.weight", "backbone.out_norm.weight", "lm_head.weight"
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# The rows of an sLSTM's gates i, f, z, o and whose tensor they are: the published cell calls the first input of its
# four "i", and its layer hands it what the tensor named fgate makes; likewise the second, "f", gets igate's.
SLSTM_GATES = "fgate", "igate", "zgate", "ogate"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def projections(config: ModelConfig) -> dict[str, tuple[str, int, int]]:
    """Where a projection's rows are: ours -> (theirs, first row, rows). The two weight modes differ only here."""
    qk, v, nh, ffn = config.qk_dim, config.v_dim, config.num_heads, config.ffn_dim
    if config.weight_mode == "single":
        return {
            "q": ("mlstm_layer.q", 0, qk),
            "k": ("mlstm_layer.k", 0, qk),
            "v": ("mlstm_layer.v", 0, v),
            "o": ("mlstm_layer.ogate_preact", 0, v),
            "i": ("mlstm_layer.igate_preact", 0, nh),
            "f": ("mlstm_layer.fgate_preact", 0, nh),
            "gate": ("ffn.proj_up_gate", 0, ffn),
            "up": ("ffn.proj_up", 0, ffn),
        }
    return {
        "q": ("mlstm_layer.qkv_opreact", 0, qk),
        "k": ("mlstm_layer.qkv_opreact", qk, qk),
        "v": ("mlstm_layer.qkv_opreact", 2 * qk, v),
        "o": ("mlstm_layer.qkv_opreact", 2 * qk + v, v),
        "i": ("mlstm_layer.ifgate_preact", 0, nh),
        "f": ("mlstm_layer.ifgate_preact", nh, nh),
        "gate": ("ffn.proj_up_gate_z", 0, ffn),
        "up": ("ffn.proj_up_gate_z", ffn, ffn),
    }


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, but for out norm and head, whose presence the files decide (see Checkpoint)."""
    D, table = config.hidden_size, projections(config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, D)}
    for n in range(config.num_blocks):
        at = f"backbone.blocks.{n}."
        slstm = n in config.slstm_at
        rows: dict[str, int] = {}
        for name, start, count in table.values():
            if not (slstm and name.startswith("mlstm_layer.")):
                rows[name] = max(rows.get(name, 0), start + count)
        linears = {name: (count, D) for name, count in rows.items()}
        linears["ffn.proj_down"] = (D, config.ffn_dim)
        if slstm:
            nh, dh = config.num_heads, config.dh
            shapes |= {f"{at}slstm_layer.{gate}.weight": (nh, dh, dh) for gate in SLSTM_GATES}
            shapes[f"{at}slstm_layer.slstm_cell._recurrent_kernel_"] = (nh, dh, 4 * dh)
            shapes[f"{at}slstm_layer.slstm_cell._bias_"] = (4 * D,)
            shapes[f"{at}slstm_layer.group_norm.weight"] = (D,)
            norms = {"norm_slstm": D, "norm_ffn": D}
        else:
            linears["mlstm_layer.out_proj"] = (D, config.v_dim)
            norms = {"norm_mlstm": D, "norm_ffn": D, "mlstm_layer.multihead_norm": config.v_dim}
        for name, shape in linears.items():
            shapes[f"{at}{name}.weight"] = shape
            if config.use_bias or "gate_preact" in name and "ogate" not in name:
                shapes[f"{at}{name}.bias"] = shape[:1]
        for name, size in norms.items():
            shapes[f"{at}{name}.weight"] = (size,)
            if config.use_bias:
                shapes[f"{at}{name}.bias"] = (size,)
    return shapes


def itemsize_of(name: str, dtype: torch.dtype) -> int:
    """Bytes of an element of that tensor once it is loaded in `dtype`: gates and an sLSTM layer are float32."""
    exact = (".igate_preact.", ".fgate_preact.", ".ifgate_preact.", ".slstm_layer.")
    return 4 if any(part in name for part in exact) else dtype.itemsize


class Checkpoint:
    """A model directory whose weights have been checked against the configuration; nothing but headers is read yet.

    The out norm is applied where the files have one, and must be there unless add_out_norm is false: transformers
    applies it whatever that key says. Likewise a head of its own is used where there is one, and must be there unless
    tie_word_embeddings is true.
    """

    def __init__(self, directory: Path, config: ModelConfig):
        self.config = config
        self._files = _locate(directory)
        self._header: dict[str, tuple[list[int], str]] = {}
        for path in sorted(set(self._files.values())):
            for name, entry in _read_header(path).items():
                if name not in self._files or self._files[name] != path:
                    raise CheckpointError(f"{path}: tensor {name!r} is in it, but {INDEX_FILE} does not say so")
                self._header[name] = entry
        self._check(directory)

    def _check(self, directory: Path) -> None:
        expected = expected_tensors(self.config)
        if OUT_NORM in self._files or self.config.add_out_norm:
            expected[OUT_NORM] = (self.config.hidden_size,)
        if HEAD in self._files or not self.config.tie_word_embeddings:
            expected[HEAD] = (self.config.vocab_size, self.config.hidden_size)
        for name, path in self._files.items():
            if name not in self._header:
                raise CheckpointError(f"{path}: tensor {name!r}, which the index promises, is missing")
            if name not in expected:
                raise CheckpointError(f"{path}: tensor {name!r} is not part of the model that config.json describes")
        for name, shape in expected.items():
            if name not in self._header:
                raise CheckpointError(
                    f"{directory}: tensor {name} {shape}, which config.json asks for, is missing from the weights"
                )
            found, dtype = self._header[name]
            if tuple(found) != shape:
                raise CheckpointError(
                    f"{self._files[name]}: tensor {name} has shape {tuple(found)}, config.json asks for {shape}"
                )
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self._files[name]}: tensor {name} is stored as {dtype}; allowed: {', '.join(DTYPES)}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the embedding, and so the model, is stored in."""
        return DTYPES[self._header[EMBEDDING][1]]

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights, matrices and norms in `dtype`: gates and all of an sLSTM layer are float32."""
        return sum(torch.Size(shape).numel() * itemsize_of(name, dtype) for name, shape in self.shapes.items())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: tuple(shape) for name, (shape, _) in self._header.items()}

    @property
    def largest_tensor_bytes(self) -> int:
        """Of what is stored; so much of the files is mapped at once while they are read."""
        return max(torch.Size(shape).numel() * DTYPES[dtype].itemsize for shape, dtype in self._header.values())

    def fingerprint(self) -> str:
        """Names this model: 32 hex digits of the configuration, all shapes, and the first row of every tensor."""
        # Left out where there are none: states made before the key was read stay valid.
        without = None if self.config.slstm_at else {"slstm_at"}
        digest = hashlib.sha256(self.config.model_dump_json(exclude=without).encode())
        for name in sorted(self._header):
            digest.update(json.dumps([name, *self._header[name]]).encode())
            row = self._read(name, slice(0, 1)).contiguous()
            digest.update(row.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def load(self, band: Band, *, dtype: torch.dtype, device: torch.device) -> tuple[list[Weights], EndWeights]:
        """Read this band's slices onto `device`: matrices and norms in `dtype`, gates in float32.

        Each file is opened for one tensor at a time, so that no more of it than that tensor is ever mapped.
        """
        leads = band.heads.start == 0  # the first band adds what is not split: biases of sums, embedding, head
        blocks = [self._block(n, band, dtype, device, leads) for n in band.blocks]
        embedding = out_norm = head = None
        last = leads and band.blocks.stop == self.config.num_blocks
        tied = HEAD not in self._header
        if leads and band.blocks.start == 0 or last and tied:
            embedding = self._tensor(EMBEDDING, dtype, device)
        if last:
            head = embedding if tied else self._tensor(HEAD, dtype, device)
            out_norm = self._tensor(OUT_NORM, dtype, device) if OUT_NORM in self._header else None
        return blocks, EndWeights(embedding, out_norm, head)

    def _block(self, n: int, band: Band, dtype: torch.dtype, device: torch.device, leads: bool) -> Weights:
        config, at, table = self.config, f"backbone.blocks.{n}.", projections(self.config)
        qk = slice(band.heads.start * config.dhqk, band.heads.stop * config.dhqk)
        v = slice(band.heads.start * config.dhhv, band.heads.stop * config.dhhv)
        nh, ffn = slice(band.heads.start, band.heads.stop), slice(band.ffn.start, band.ffn.stop)
        band_rows = {"q": qk, "k": qk, "v": v, "o": v, "i": nh, "f": nh, "gate": ffn, "up": ffn}

        def stack(parts: str, kind: str, to: torch.dtype) -> Tensor:
            """The band's rows of several projections, one under the other, read straight into their place."""
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

        def bias(parts: str) -> Tensor | None:
            return stack(parts, "bias", dtype) if config.use_bias else None

        def one(name: str, *where: slice) -> Tensor:
            return self._tensor(at + name, dtype, device, *where)

        def maybe(name: str, *where: slice, when: bool = True) -> Tensor | None:
            return one(name, *where) if config.use_bias and when else None

        everything = slice(None)
        feed: dict[str, Any] = {
            "feed_norm": one("norm_ffn.weight"),
            "feed_norm_bias": maybe("norm_ffn.bias"),
            "up": stack("gate up", "weight", dtype),
            "up_bias": bias("gate up"),
            "down": one("ffn.proj_down.weight", everything, ffn),
            "down_bias": maybe("ffn.proj_down.bias", when=leads),
        }
        if n in config.slstm_at:
            dh = config.dh

            def exact(name: str, *where: slice) -> Tensor:
                return self._tensor(f"{at}slstm_layer.{name}", torch.float32, device, *where)

            gates = torch.empty(len(band.heads), 4, dh, dh, device=device)
            for gate, name in enumerate(SLSTM_GATES):
                gates[:, gate] = exact(f"{name}.weight", nh)
            return SlstmWeights(
                mix_norm=one("norm_slstm.weight"),
                mix_norm_bias=maybe("norm_slstm.bias"),
                gates=gates.flatten(1, 2),
                recurrent=exact("slstm_cell._recurrent_kernel_", nh),
                gates_bias=exact("slstm_cell._bias_", slice(4 * dh * nh.start, 4 * dh * nh.stop)).view(-1, 4 * dh),
                head_norm=1 + exact("group_norm.weight", slice(dh * nh.start, dh * nh.stop)),
                channel=torch.tensor(dh * nh.start, device=device),
                **feed,
            )
        return BlockWeights(
            mix_norm=one("norm_mlstm.weight"),
            mix_norm_bias=maybe("norm_mlstm.bias"),
            qkvo=stack("q k v o", "weight", dtype),
            qkvo_bias=bias("q k v o"),
            gates=stack("i f", "weight", torch.float32),
            gates_bias=stack("i f", "bias", torch.float32),
            head_norm=one("mlstm_layer.multihead_norm.weight", v),
            head_norm_bias=maybe("mlstm_layer.multihead_norm.bias", v),
            out=one("mlstm_layer.out_proj.weight", everything, v),
            out_bias=maybe("mlstm_layer.out_proj.bias", when=leads),
            **feed,
        )

    def _tensor(self, name: str, dtype: torch.dtype, device: torch.device, *where: slice) -> Tensor:
        part = self._read(name, *where)
        out = torch.empty(part.shape, dtype=dtype, device=device)
        return self._finite(out.copy_(part), name)

    def _finite(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor, or CheckpointError where it holds a NaN or an infinity, which would spread to every result."""
        # A sum is one pass without a temporary; it may overflow where every value is finite, hence the second look.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{self._files[name]}: tensor {name} holds values that are not finite in {tensor.dtype}"
            )
        return tensor

    def _read(self, name: str, *where: slice) -> Tensor:
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(name)[where if where else slice(None)]
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {one_line(err)}") from None


def _locate(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor, from model.safetensors or its index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return dict.fromkeys(_read_header(single), single)
    if not index.is_file():
        try:
            beside = sorted(directory.iterdir())
        except OSError as err:
            raise CheckpointError(f"{directory}: cannot be read ({err.strerror})") from None
        pickled = next((p for p in beside if p.suffix in (".bin", ".pt", ".pth", ".ckpt")), None)
        if pickled:
            raise CheckpointError(
                f"{pickled}: pickled weights can run code when opened and are refused; convert them to {SINGLE_FILE}"
            )
        raise CheckpointError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
    content = read_json(index, CheckpointError)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
    files = {}
    for name, file in weight_map.items():
        # A file name, never a path: an index from elsewhere must not make us read outside the model's directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {str(file)[:80]!r}, which is no .safetensors file name"
            )
        files[name] = directory / file
    for path in sorted(set(files.values())):
        try:
            missing = not path.is_file()
        except OSError:  # a name that no file can have
            missing = True
        if missing:
            raise CheckpointError(f"{directory}: {path.name[:80]!r} is missing, but {INDEX_FILE} names it")
    return files


def _read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Every tensor's shape and dtype name; the library checks offsets and the file's length."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
        with path.open("rb") as raw:
            parse_json(raw.read(int.from_bytes(raw.read(8), "little")))  # the library takes the last of equal names
        return header
    except (SafetensorError, OSError, ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: is not a whole safetensors file: {one_line(err)}") from None
