"""The composition root: Settings -> Engine. The only place that picks a device, a backend and an executor."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from xlstm_ray.checkpoint import Checkpoint
from xlstm_ray.config import ModelConfig
from xlstm_ray.decode import Decoder, Sampling, TextStream
from xlstm_ray.errors import CheckpointError, KernelError, StateError, UsageError
from xlstm_ray.kernels import Backend, chunkwise_backend
from xlstm_ray.memory import peak_device_bytes
from xlstm_ray.model import Kernels, Worker, make_grid
from xlstm_ray.prefill import driver
from xlstm_ray.prefill.driver import Progress
from xlstm_ray.prefill.executor import Executor, InProcessExecutor
from xlstm_ray.prefill.plan import window_sizes
from xlstm_ray.settings import DEFAULT_BACKEND, Settings
from xlstm_ray.state import EMPTY_PROMPT, Grid, RecurrentState, extend_prompt_hash

DEMO_MODEL = Path(__file__).parent / "demo"

Prompt = str | Sequence[int]


class NextToken(NamedTuple):
    id: int
    text: str
    logprob: float


@dataclass
class Statistics:
    """Figures of a run: counts in tokens, times in seconds, memory in bytes."""

    row_tokens: list[int]  # prompt tokens, a row
    row_resumed: list[int]  # of these, found in the given state
    compile_s: float
    prefill_s: float
    ttft_s: float  # from the first tile to the first token's logits; loading and compiling are not in it
    peak_memory_bytes: int
    tile_seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.row_tokens)

    @property
    def resumed_tokens(self) -> int:
        return sum(self.row_resumed)

    @property
    def prefill_tok_s(self) -> float | None:
        new = self.prompt_tokens - self.resumed_tokens
        return new / self.prefill_s if new and self.prefill_s > 0 else None


@dataclass
class PrefillResult:
    """state: what to decode or go on from. logits (B, vocabulary) float32: of each row's last token."""

    state: RecurrentState
    logits: Tensor
    stats: Statistics
    all_logits: list[Tensor] = field(default_factory=list, repr=False)  # a row (tokens, vocabulary)

    @property
    def complete(self) -> bool:
        """False where the run was stopped before the prompt's end."""
        return self.state.complete


class Engine:
    """A loaded model on its device: prefill and generate. Made by `xlstm_ray.load`."""

    def __init__(self, settings: Settings):
        started = perf_counter()
        self.settings = settings
        self.device = _device(settings)
        self.model_path = settings.model or DEMO_MODEL
        self.config = ModelConfig.from_file(_directory(self.model_path) / "config.json")
        self.backend, self.grid = _grid(settings, self.config, self.device)
        _require_compiler(self.backend, self.device)
        self.tokenizer = _tokenizer(self.model_path / "tokenizer.json", self.config)
        checkpoint = Checkpoint(self.model_path, self.config)
        dtype = checkpoint.dtype if self.device.type == "cpu" else torch.bfloat16
        if settings.dtype != "auto":
            dtype = getattr(torch, settings.dtype)
        elif dtype not in (torch.float32, torch.bfloat16):
            dtype = torch.float32
        self.dtype = dtype
        self.grid = self.grid.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        self.fingerprint = checkpoint.fingerprint()
        kernels = Kernels(self.backend, chunk_size=self.grid.chunk_size, t_inner=settings.t_inner)
        stages = make_grid(self.config, heads_per_band=self.grid.heads_per_band)
        self.bands, self.stages = len(stages[0]), len(stages)
        self.workers = min(settings.workers or self.bands, self.bands)
        self.executor: Executor = InProcessExecutor(
            [
                [Worker(self.config, band, *checkpoint.load(band, dtype=dtype, device=self.device), kernels) for band in bands]
                for bands in stages
            ],
            threads=self.workers,
        )
        self.load_s = perf_counter() - started
        self._warm: set[tuple[int, int]] = set()

    # -- tokens --------------------------------------------------------------------------------------------------------
    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's tokens, with the begin token where the model's configuration asks for it.

        Raises UsageError for an empty prompt or a token outside the vocabulary.
        """
        tokens = list(self.tokenizer.encode(prompt).ids) if isinstance(prompt, str) else [int(t) for t in prompt]
        bos = self.config.bos_token_id
        if isinstance(prompt, str) and self.config.force_bos_token_insert and bos is not None and tokens[:1] != [bos]:
            tokens = [bos, *tokens] if tokens else tokens
        if not tokens:
            raise UsageError("the prompt is empty; give at least one token, with --prompt or --prompt-file")
        odd = next((t for t in tokens if not 0 <= t < self.config.vocab_size), None)
        if odd is not None:
            raise UsageError(f"token {odd} is outside the model's vocabulary of {self.config.vocab_size}")
        return tokens

    def next_tokens(self, logits: Tensor, count: int = 5) -> list[NextToken]:
        """The likeliest next tokens: logits (vocabulary,) -> id, text, log probability."""
        top = torch.log_softmax(logits.double(), -1).topk(min(count, len(logits)))
        return [
            NextToken(i, self.tokenizer.decode([i], skip_special_tokens=False), p)
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    # -- prefill -------------------------------------------------------------------------------------------------------
    def prefill(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        state: RecurrentState | None = None,
        all_logits: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> PrefillResult:
        """Consume one prompt or a batch of them (texts or token ids), from `state` on where one is given.

        With a state, only what is new is computed; without a prompt it is taken as it is. should_stop is asked
        between tiles; a stopped run gives a state that resumes there. Raises StateError where the state belongs to
        another model, grid or prompt, and UsageError for an empty prompt.
        """
        if state is not None:
            state.check(self.config, self.fingerprint)
            if state.grid != self.grid:
                raise StateError(
                    f"the state was made on another grid ({state.grid.differences(self.grid)}); "
                    "use the same settings, or leave them out to take the state's"
                )
        if prompt is None:
            if state is None:
                raise UsageError("neither a prompt nor a state was given")
            self.executor.set_state(state.tensors, state.batch)
            stats = Statistics(state.tokens, state.tokens, 0.0, 0.0, 0.0, peak_device_bytes(self.device))
            return PrefillResult(state, state.tensors["logits"], stats)
        rows = [torch.tensor(self.encode(p)) for p in _batch(prompt)]
        begin, hashes, logits = self._resume(rows, state)
        sizes = window_sizes(
            begin, [len(r) for r in rows], tile_size=self.grid.tile_size, chunk_size=self.grid.chunk_size
        )
        compile_s = self.warm_up(len(rows), sizes)
        self.executor.set_state(None if state is None else state.tensors, len(rows))
        outcome = driver.prefill(
            self.executor,
            rows,
            begin=begin,
            logits=logits,
            tile_size=self.grid.tile_size,
            chunk_size=self.grid.chunk_size,
            all_logits=all_logits,
            on_progress=on_progress,
            should_stop=should_stop,
        )
        stats = Statistics(
            [len(row) for row in rows],
            list(begin),
            compile_s,
            outcome.seconds,
            outcome.seconds,
            peak_device_bytes(self.device),
            outcome.tile_seconds,
        )
        hashes = [
            extend_prompt_hash(h, row[b:c].tolist())
            for h, row, b, c in zip(hashes, rows, begin, outcome.consumed, strict=True)
        ]
        complete = outcome.consumed == [len(r) for r in rows]
        state = self._state(outcome.logits, outcome.consumed, hashes, complete)
        return PrefillResult(state, outcome.logits, stats, outcome.all_logits)

    def warm_up(self, batch: int, sizes: Sequence[int]) -> float:
        """Compile what windows of these sizes need, once; returns the seconds it took."""
        started = perf_counter()
        missing = [size for size in sizes if (batch, size) not in self._warm]
        if missing and self.backend.compiled:
            self.executor.warm_up(batch, missing)
            self._warm |= {(batch, size) for size in missing}
            return perf_counter() - started
        return 0.0

    # -- generate ------------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        state: RecurrentState | None = None,
        max_new_tokens: int = 64,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> "Generation":
        """Prefill, then an iterator of pieces of text. Greedy unless temperature, top_p or a seed is given."""
        sampling = Sampling.make(temperature, top_p, seed)
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens is {max_new_tokens}; allowed: 1 or more")
        prefill = self.prefill(prompt, state=state, on_progress=on_progress, should_stop=should_stop)
        return Generation(self, prefill, sampling, max_new_tokens, should_stop)

    def close(self) -> None:
        """Let go of the model."""
        self.executor.close()

    # ------------------------------------------------------------------------------------------------------------------
    def _resume(self, rows: list[Tensor], state: RecurrentState | None) -> tuple[list[int], list[str], Tensor | None]:
        """Where each row goes on: first new token, hash of what comes before, logits of the token before."""
        if state is None:
            return [0] * len(rows), [EMPTY_PROMPT] * len(rows), None
        if state.batch != len(rows):
            raise StateError(f"the state is of {state.batch} prompts, but {len(rows)} were given")
        for b, (row, known, prompt_hash) in enumerate(zip(rows, state.tokens, state.prompt_hash, strict=True)):
            which = f"prompt {b + 1}" if len(rows) > 1 else "the prompt"
            if len(row) < known:
                raise StateError(
                    f"{which} has {len(row)} tokens, but the state has already seen {known}; give the same prompt or a longer one"
                )
            if extend_prompt_hash(EMPTY_PROMPT, row[:known].tolist()) != prompt_hash:
                raise StateError(
                    f"the first {known} tokens of {which} are not those that the state has seen; the state is of another prompt"
                )
        return state.tokens, state.prompt_hash, state.tensors["logits"]

    def _state(self, logits: Tensor, tokens: list[int], hashes: list[str], complete: bool) -> RecurrentState:
        tensors = self.executor.get_state()
        tensors["logits"] = logits
        return RecurrentState(
            tensors, tokens=tokens, prompt_hash=hashes, model=self.fingerprint, grid=self.grid, complete=complete
        )


class Generation:
    """What `generate` returns: iterate for pieces of text (one prompt) or lists of pieces (a batch)."""

    def __init__(
        self,
        engine: Engine,
        prefill: PrefillResult,
        sampling: Sampling,
        max_new_tokens: int,
        should_stop: Callable[[], bool],
    ):
        self.prefill = prefill
        self._engine, self._limit, self._should_stop = engine, max_new_tokens, should_stop
        self._decoder = Decoder(engine.executor, prefill.logits, sampling, engine.config.eos_token_id)
        self.compile_s = engine.warm_up(prefill.state.batch, [1]) if prefill.complete and max_new_tokens > 1 else 0.0
        self.texts = [""] * prefill.state.batch

    def rows(self) -> Iterator[list[str]]:
        """A piece of text for each row, step by step."""
        if not self.prefill.complete:
            return  # stopped on the way: there is nothing to decode from yet
        streams = [TextStream(self._engine.tokenizer) for _ in self.texts]
        for step in self._decoder.run(self._limit, self._should_stop):
            pieces = [
                "" if token is None else stream.step(token) for stream, token in zip(streams, step, strict=True)
            ]
            self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]
            yield pieces

    def __iter__(self) -> Iterator[str]:
        if len(self.texts) != 1:
            raise UsageError("a batch has no single text to iterate over; use rows()")
        return (pieces[0] for pieces in self.rows())

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens made so far, a row, without the end token."""
        return self._decoder.tokens

    @property
    def decode_s(self) -> float:
        return self._decoder.seconds

    @property
    def decode_tok_s(self) -> float | None:
        """Tokens made a second over all rows; the first comes with the prefill and needs no step."""
        made = sum(len(row) for row in self.tokens)
        return made / self.decode_s if made and self.decode_s > 0 else None

    def state(self) -> RecurrentState:
        """The state after everything made so far: generating from it goes on where this stopped."""
        before = self.prefill.state
        if not before.complete:
            return before
        self._engine.warm_up(before.batch, [1])
        self._decoder.catch_up()
        tokens = [n + len(made) for n, made in zip(before.tokens, self.tokens, strict=True)]
        hashes = [extend_prompt_hash(h, made) for h, made in zip(before.prompt_hash, self.tokens, strict=True)]
        return self._engine._state(self._decoder.logits, tokens, hashes, True)


def load(model: str | Path | None = None, **options: Any) -> Engine:
    """A model directory (none: the demo model that ships with the package) -> Engine.

    options: device, dtype, chunkwise_backend, tile_size, chunk_size, heads_per_band, workers, as the flags of the
    command line. Raises errors of xlstm_ray.errors, each one line for the user.
    """
    return Engine(Settings.make(model=model, **options))


# ----------------------------------------------------------------------------------------------------------------------
def _batch(prompt: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if not len(prompt):
        raise UsageError("the prompt is empty; give at least one token, with --prompt or --prompt-file")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)  # type: ignore[list-item, arg-type]


def _directory(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a directory; --model takes one with config.json and weights")
    return path


def _device(settings: Settings) -> torch.device:
    """The device asked for, or the best there is."""
    there = {
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
        "cpu": True,
    }
    name = settings.device
    if name == "auto":
        name = next(n for n, is_there in there.items() if is_there)
    if not there[name]:
        have = ", ".join(n for n, is_there in there.items() if is_there)
        raise UsageError(f"--device is {name!r}, but this machine has none; available: {have}")
    if name == "mps" and settings.enable_mps_fallback:
        raise UsageError(
            "PYTORCH_ENABLE_MPS_FALLBACK is on, which lets operators leave the GPU silently; set it to 0"
        )
    return torch.device(name)


def _grid(settings: Settings, config: ModelConfig, device: torch.device) -> tuple[Backend, Grid]:
    """Backend and grid: what was asked, else what the model's configuration says, else the device's defaults."""
    name = settings.chunkwise_backend
    if name is None:
        own = config.chunkwise_kernel.removeprefix("chunkwise--")
        name = own if own.startswith(("queued_", "ray_")) else DEFAULT_BACKEND
    backend = chunkwise_backend(name)
    chunk = settings.chunk_size or config.chunk_size
    tile = settings.tile_size
    if tile is None:
        # A tile long enough to keep the matrix products efficient, short enough to stop and report within a second.
        tile = chunk * max(1, {"cuda": 4096, "mps": 1024, "cpu": 512}[device.type] // chunk)
    if tile % chunk:
        raise UsageError(f"--tile-size is {tile}, which is no multiple of the chunk size {chunk}; try {-(-tile // chunk) * chunk}")
    heads = settings.heads_per_band
    if heads is not None and heads > config.num_heads:
        raise UsageError(f"--heads-per-band is {heads}, but the model has {config.num_heads} heads")
    if heads is None:
        heads = min(4, config.num_heads) if device.type == "mps" else config.num_heads
    return backend, Grid(kernel=backend.kernel, tile_size=tile, chunk_size=chunk, heads_per_band=heads, dtype="float32")


def _require_compiler(backend: Backend, device: torch.device) -> None:
    """Inductor builds C++ on the CPU; say so before anything is loaded where there is no compiler."""
    if not backend.compiled or device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise KernelError(
            f"--chunkwise-backend {backend.name} compiles its kernels and needs a C++ compiler (g++ or clang++, or its "
            "path in CXX), and there is none; install one, or use --chunkwise-backend native, the slow eager reference"
        ) from None


def _tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    try:
        text = path.read_bytes().decode("utf-8")
        json.loads(text)
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read ({err.strerror})") from None
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: is not JSON ({err})") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as err:  # noqa: BLE001 the library raises nothing narrower; the text is all it was given
        raise CheckpointError(f"{path}: is no tokenizer of the tokenizers library ({err})") from None
    # A file may ask for these, and a prompt would be cut or filled up without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
