"""The work of one shard's actor: a Worker behind calls that carry tensors between processes.

Its calls run in the threads of actor.py. B batch, T tokens, D hidden size. On the wire a tensor is a numpy array, which
Ray shares between the processes of a node without copying; bfloat16 travels as int16. What arrives is read-only and
must never be written to. Between GPUs of one host only a Spot travels: the next stage reads from this one's GPU.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock, get_ident, local
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from xlstm_ray import hub
from xlstm_ray.actors.call import Call, Done, Kept
from xlstm_ray.actors.chooser import Chooser
from xlstm_ray.actors.copies import Copies
from xlstm_ray.actors.ring import Ring, Spot
from xlstm_ray.actors.watchdog import ActorSample
from xlstm_ray.actors.wire import Wire, from_wire, to_wire
from xlstm_ray.checkpoint import Checkpoint, Stored
from xlstm_ray.config import ModelConfig
from xlstm_ray.errors import CheckpointError, UsageError, one_line
from xlstm_ray.kernels import chunkwise_backend
from xlstm_ray.kernels.compiled import compile_strict
from xlstm_ray.kernels.fit import KERNEL, LEAST_CHUNK, Asked, misfit
from xlstm_ray.kernels.inductor import require_same_switch
from xlstm_ray.layout import Shard
from xlstm_ray.memory.sample import device_total_bytes, empty_cache, peak_device_bytes, take_sample
from xlstm_ray.runtime.blocks import Kernels
from xlstm_ray.runtime.canaries import require_sound
from xlstm_ray.runtime.executor import Choice, Following, Step
from xlstm_ray.runtime.graphs import Graphs
from xlstm_ray.runtime.worker import Move, build_worker
from xlstm_ray.supervisor.processes import this_machine, this_process
from xlstm_ray.threads import settle


@dataclass(frozen=True)
class WorkerSpec:
    """What all actors of a grid have in common."""

    model: Path
    config: ModelConfig
    stored: Mapping[str, Stored]  # the digests of the driver's weights
    backend: str
    device: str  # its type
    dtype: torch.dtype  # of the residual stream
    t_inner: int
    fusion_limit: int | None
    threads: int
    eager: bool = False  # torch compiles nothing
    float8: bool = False  # of the large matrices
    graphs: bool = False  # decoding in place is captured


class ShardWork:
    """Owns the weights and states of one shard.

    With one band a tile takes two calls: `run`, and `output`, which passes its result on. With several bands, `embed`
    or the stage before sends every band the residual stream. `run_mixer` and `run_ffn` return this band's partial
    sums, and each band adds up the sums of all bands, always in the order of the bands. The first band's `leave` passes
    the result on.
    """

    whole = True  # a tile goes through all blocks before anybody waits for one of them

    def __init__(self, spec: WorkerSpec, shard: Shard, name: str, *, one_band: bool):
        self.spec, self.shard, self.name, self.one_band = spec, shard, name, one_band
        self.epoch = 0
        self._own = local()  # what each thread has set up
        self._calls: dict[int, float] = {}  # by thread: when its call began
        self._x: dict[int, Tensor] = {}  # a tile's residual stream between two of its calls
        self._done: dict[tuple[int, int], Done] = {}  # by epoch: the same tile may be under way twice
        self._kept: dict[tuple[int, int], Kept] = {}
        self._ring: Ring | None = None  # to the next stage's GPU
        self.tokens: Graphs | None = None
        self._launch = Lock()  # a token's step is launched by one thread at a time

    # -- compute -------------------------------------------------------------------------------------------------------
    def load(self) -> None:
        """Read this shard's slice of the checkpoint. CheckpointError if this node's model is not the driver's."""
        spec, node = self.spec, os.uname().nodename
        self._threads()
        self.device = torch.device(spec.device)
        self._copies = Copies(self.device, spec.dtype)
        self._chooser = Chooser(spec.config.vocab_size, self.device)
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there[self.device.type]:
            raise UsageError(f"`device` is {spec.device!r}, but node {node} has none")
        require_sound(self.device, spec.config)
        if not spec.model.is_dir():
            command = hub.fetched_by(spec.model)
            how = f"`{command}` with the same HF_HOME" if command else "a copy, or a mount of the same files,"
            raise CheckpointError(
                f"{spec.model}: node {node} has no such directory; every node reads the model at the driver's path, "
                f"so {how} is needed there"
            )
        config = ModelConfig.from_file(spec.model / "config.json")
        if config != spec.config:
            raise CheckpointError(f"{spec.model}: node {node} has another model there than the driver")
        backend = chunkwise_backend(spec.backend)
        if backend.kernel == KERNEL:
            columns, capability = [len(self.shard.ffn)], torch.cuda.get_device_capability()
            why = misfit(Asked(config, columns, LEAST_CHUNK, "bfloat16", capability))
            if why is not None:
                raise UsageError(f"`chunkwise_backend` is {spec.backend!r}, but on node {node} {why}")
        if backend.compiled:
            require_same_switch(eager=spec.eager, node=node)
        checkpoint = Checkpoint(spec.model, config, spec.stored)  # what this shard reads is checked while it is read
        if backend.compiled and not spec.eager:  # here: or every actor would start a pool of compiler processes
            torch._inductor.config.compile_threads = 1
        kernels = Kernels(
            backend,
            t_inner=spec.t_inner,
            compiler=partial(compile_strict, fusion_limit=spec.fusion_limit, guards=False),
        )
        self.worker = build_worker(
            checkpoint, kernels, self.shard, dtype=spec.dtype, device=self.device, float8=spec.float8
        )
        own = backend.kernel == KERNEL and self.one_band
        self.tokens = Graphs(self.worker, capture=spec.graphs, tiles=self.whole) if spec.graphs or own else None
        self.is_last = self.shard.blocks.stop == config.num_blocks

    def warm_up(self, batch: int, sizes: list[int], chunk_size: int) -> None:
        """Compile for windows of these sizes."""
        alone = partial(self.worker.warm_up, one_band=self.one_band)
        for size in sizes:
            self._compute(alone if self.tokens is None else self.tokens.warm_up, batch, size, chunk_size)
        self._compute(self.worker.warm_up_logits, batch)
        self.worker.kernels.wait()
        settle()  # frees the compiler's graphs, which are cycles; later work makes no cycles
        empty_cache(self.device)

    def reset(self, epoch: int) -> None:
        """Begin an epoch: drop all states and tiles."""
        with self._launch:
            self.epoch = epoch
            for tiles in (self._x, self._done, self._kept, self._chooser.logits, self.worker.states):
                tiles.clear()
        if self.device.type == "cuda":  # nobody may read any more what the next tiles write over
            torch.cuda.synchronize(self.device)

    def offer(self) -> Spot:
        """The numbers 0 to 63 in this GPU's memory, for a stage that tries to read there."""
        spot = Ring(1).put(torch.arange(64, device=self.device))
        torch.cuda.synchronize(self.device)
        return spot

    def read(self, spot: Spot) -> str:
        """Try to read what another stage offers. Returns why it cannot be read; empty if it can."""
        self._copies.mapped.clear()
        try:
            right = torch.equal(self._copies.enter(spot).cpu(), torch.arange(64))
        except RuntimeError as error:  # CUDA's
            return one_line(error)
        return "" if right else "another GPU's memory is read wrongly"

    def hand_over(self, places: int) -> None:
        """Leave results in this GPU's memory, where the next stage reads them. places: steps in flight; 0: no more."""
        self._ring = (self._ring or Ring(places)) if places else None  # what a dead reader has mapped is never free

    def load_state(
        self, epoch: int, number: int, tensors: dict[str, Wire] | None, batch: int, drop: tuple[int, ...], *_after: None
    ) -> None:
        """Make a state from these tensors of all heads. None: a fresh state."""
        if epoch == self.epoch:
            self._drop(drop)
            state = None
            if tensors is not None:
                state = {name: from_wire(array, torch.float32) for name, array in tensors.items()}
            self._compute(self.worker.load, number, state, batch)

    def take(
        self, epoch: int, number: int, rows: list[tuple[int, int] | None], drop: tuple[int, ...], *_after: None
    ) -> None:
        """Make a state from copies of these rows."""
        if epoch == self.epoch:
            self._drop(drop)
            self._compute(self.worker.take, number, rows)

    def save(self, epoch: int, number: int, *_after: None) -> dict[str, Wire] | None:
        """This band's tensors of a state."""
        if epoch != self.epoch:
            return None
        return self._compute(lambda: self._copies.state(self.worker.save(number)))

    def run(self, call: Call, x: Wire | Spot, *_after: None) -> None:
        """Run a tile through the whole stage, if one band has all heads. x: tokens (B, T) in the first stage."""
        if call.epoch == self.epoch:
            self._compute(self._run, call, x)

    def embed(self, call: Call, tokens: Wire) -> Wire | None:
        """tokens (B, T) -> residual stream (B, T, D)."""
        if call.epoch != self.epoch:
            return None
        return self._compute(lambda: to_wire(self._enter(tokens)))

    def run_mixer(self, call: Call, n: int, _after: None, *parts: Wire) -> tuple[Wire | None, None]:
        """This band's share of the mixer of block n; parts: the stage's input, or all bands' `run_ffn` of n - 1."""
        if call.epoch != self.epoch:
            return None, None
        return self._compute(self._run_mixer, call, n, parts), None

    def run_ffn(self, call: Call, n: int, *parts: Wire) -> Wire | None:
        """This band's share of the feed-forward of block n; parts: all bands' `run_mixer` of n."""
        if call.epoch != self.epoch:
            return None
        return self._compute(self._run_ffn, call, n, parts)

    def leave(self, call: Call, *parts: Wire) -> Any:
        """The residual stream after this stage, for the next stage; after the last stage, the same as `output`."""
        if call.epoch != self.epoch:
            return None
        return self._compute(lambda: self._hand_on(self._result(call, self._add(self._x.pop(call.number), parts))))

    def logits(self, hidden: Wire) -> Wire:
        """hidden (B, D) after the last block -> logits (B, vocabulary) float32."""
        return self._compute(lambda: to_wire(self.worker.logits(from_wire(hidden, self.spec.dtype))))

    # -- transfer, snapshot --------------------------------------------------------------------------------------------
    def output(self, call: Call, _after: None) -> Any:
        """The result of `run` for a tile: the residual stream (B, T, D). After the last stage: (each row's last hidden
        (B, D),), and logits and log-probabilities if they were requested."""
        done = self._done.pop((call.epoch, call.number), None)
        if call.epoch != self.epoch or done is None:
            return None
        with self._copies.beside(done.fence, "out"):
            return self._hand_on(done.result)

    # -- tokens: launched in order by two threads, of which one waits for the device meanwhile -------------------------
    def token(self, packed: list[Any], x: Wire | Spot, *_after: None) -> tuple[Any, None]:
        """A token of each row through the stage, if one band has all heads: as `run` and `output` in one call. After
        the last stage, with call.rows: the tokens (B,) that it has chosen, alone. packed: Call.packed."""
        call = Call.unpacked(packed)
        with self._launch:
            if call.epoch != self.epoch:
                return None, None
            done = self._compute(self._stepped, call, x)
        with self._copies.beside(done.fence, "out"):
            return self._hand_on(done.result), None

    def last_logits(self, epoch: int, number: int, row: int, *_after: None) -> Wire | None:
        """Logits (vocabulary,) of a row, of the last step of this state, which chose its tokens here."""
        return to_wire(self._chooser.logits[number][row]) if epoch == self.epoch else None

    def kept(self, call: Call, *_after: None) -> dict[str, Wire] | None:
        """The state after this tile."""
        kept = self._kept.pop((call.epoch, call.number), None)
        if call.epoch != self.epoch or kept is None:
            return None
        with self._copies.beside(kept.fence, "state"):
            return self._copies.state(self.worker.named(kept.blocks))

    # -- control -------------------------------------------------------------------------------------------------------
    def sample(self) -> ActorSample:
        """This actor's process, node, memory, and time in its present call."""
        import ray

        since, device = min(self._calls.copy().values(), default=None), torch.device(self.spec.device)
        return ActorSample(
            this_process(),
            this_machine(),
            ray.get_runtime_context().get_node_id(),
            None if since is None else monotonic() - since,
            peak_device_bytes(device) + (self.tokens.bytes if self.tokens is not None else 0),
            take_sample(device),
            device_total_bytes(device),
        )

    def empty_cache(self) -> None:
        """Free memory that the device's allocator holds without need."""
        empty_cache(torch.device(self.spec.device))

    # ------------------------------------------------------------------------------------------------------------------
    def _run(self, call: Call, x: Wire | Spot) -> None:
        self._drop(call.drop)
        hidden = self._through(call, x)
        if call.keep:  # blocks never write into an old state, so a reference keeps it
            self._kept[call.epoch, call.number] = Kept(list(self.worker.states[call.dst]), self._copies.fence())
        result = self._result(call, hidden)
        self._done[call.epoch, call.number] = Done(self._left(result), self._copies.fence())

    def _through(self, call: Call, x: Wire | Spot) -> Tensor:
        """Through all blocks of the stage."""
        hidden, move = self._enter(x), self._move(call)
        return self.worker.run_blocks(hidden, move) if self.tokens is None else self.tokens.tile(hidden, move)

    def _stepped(self, call: Call, x: Wire | Spot) -> Done:
        self._drop(call.drop)
        choice = self._chooser.choice(call.rows) if call.rows is not None and self.is_last else None
        if self.tokens is not None:
            result = self._by_graph(self.tokens, call, x, choice)
        else:
            result = self._result(call, self._through(call, x))
            if choice is not None:
                logits = self._chooser.logits[call.dst] = result[1].to(choice.sampler.device)
                result = (self._chooser.pick(choice, logits),)
        if call.keep:
            states = list(self.worker.states[call.dst])
            if self.tokens is not None:  # the next step writes over it
                states = [state and tuple(part.clone() for part in state) for state in states]  # type: ignore[misc]
            self._kept[call.epoch, call.number] = Kept(states, self._copies.fence())
            if choice is not None:  # nobody makes this state again from the one before
                result = (*result, self._chooser.logits[call.dst])
        return Done(self._left(result), self._copies.fence())

    def _by_graph(self, graphs: Graphs, call: Call, x: Wire | Spot, choice: Choice | None) -> tuple[Tensor, ...]:
        """A token of each row through the whole stage, as a CUDA graph if it is in place."""
        here = self._copies.mapped.view(x) if isinstance(x, Spot) else from_wire(x, self.spec.dtype)
        in_place = call.src == call.dst
        start, end = torch.tensor(call.start), torch.tensor(call.end)
        if not in_place:
            self.worker.take(call.dst, [(call.src, row) for row in range(len(start))])
        step = Step(here, start, end, 1, logits=call.logits, in_place=in_place, choice=choice)
        outcome = graphs.step(call.dst, here, step)
        if not self.is_last:
            return (outcome.x,)
        if outcome.tokens is not None and outcome.logits is not None:
            self._chooser.logits[call.dst] = outcome.logits
            return (outcome.tokens,)
        hidden = outcome.x[:, 0]
        return (hidden,) if outcome.logits is None else (hidden, outcome.logits)

    def _left(self, result: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Spot:
        """A result, or where the next stage reads it."""
        return result if self._ring is None or self.is_last else self._ring.put(result[0])

    def _run_mixer(self, call: Call, n: int, parts: tuple[Wire, ...]) -> Wire:
        self._drop(call.drop, n)
        x = self._x[call.number] = self._enter(*parts) if n == 0 else self._add(self._x[call.number], parts)
        part = self.worker.run_mixer(n, x, self._move(call))
        if call.keep:
            kept = self._kept.setdefault((call.epoch, call.number), Kept([], None))
            kept.blocks.append(self.worker.states[call.dst][n])
        return to_wire(part)

    def _run_ffn(self, call: Call, n: int, parts: tuple[Wire, ...]) -> Wire:
        x = self._x[call.number] = self._add(self._x[call.number], parts)
        part = self.worker.run_ffn(n, x, self._move(call))
        if n + 1 == len(self.shard.blocks) and self.shard.heads.start > 0:
            del self._x[call.number]  # only the first band needs it later
        return to_wire(part)

    def _enter(self, x: Wire | Spot) -> Tensor:
        """The residual stream on the device, from tokens or from the stage before."""
        here = self._copies.enter(x)
        return self.worker.embed(here) if here.ndim == 2 else here

    def _add(self, x: Tensor, parts: tuple[Wire, ...]) -> Tensor:
        for part in parts:
            x = x + self._copies.upload(from_wire(part, self.spec.dtype))
        return x

    def _drop(self, states: tuple[int, ...], n: int | None = None) -> None:
        for number in states:
            self.worker.free(number, n)
            self._chooser.logits.pop(number, None)

    def _move(self, call: Call) -> Move:
        start, end = (self._copies.upload(torch.tensor(each)) for each in (call.start, call.end))
        return Move(call.src, call.dst, start, end, call.chunk_size)

    def _result(self, call: Call, x: Tensor) -> tuple[Tensor, ...]:
        if not self.is_last:
            return (x,)
        rows = torch.arange(x.shape[0], device=x.device)
        hidden = x[rows, (self._copies.upload(torch.tensor(call.end)) - 1).clamp(min=0)]
        result = [hidden]
        if call.logits != "none":
            result.append(self.worker.logits(hidden if call.logits == "last" else x))
        if call.following is not None:
            tokens, likeliest = call.following
            result += self.worker.logprobs(x, Following(from_wire(tokens, torch.int64), likeliest))
        return tuple(result)

    def _hand_on(self, result: tuple[Tensor, ...] | Spot) -> Any:
        if isinstance(result, Spot):
            return result
        return [*map(to_wire, result)] if self.is_last else to_wire(result[0])

    def _compute(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._threads()
        self._calls[get_ident()] = monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            del self._calls[get_ident()]

    def _threads(self) -> None:
        """torch's thread count is per thread and is compiled in: set it on each thread that computes."""
        if not hasattr(self._own, "threads"):
            torch.set_num_threads(self.spec.threads)
            self._own.threads = self.spec.threads
