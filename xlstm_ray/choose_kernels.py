"""Which kernels a run has on a GPU, by the table of what the Triton kernels take, and whether decoding is captured."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from xlstm_ray.choose import Setup, own_backend
from xlstm_ray.errors import UsageError
from xlstm_ray.kernels import Backend, chunkwise_backend
from xlstm_ray.kernels.fit import CAPABILITY, KERNEL, Asked, misfit
from xlstm_ray.settings import Settings


class Kernels(NamedTuple):
    """The backend of a run; misfit: why it does not have the Triton kernels on a GPU, where nobody named a backend."""

    backend: Backend
    misfit: str | None = None


def choose_kernels(setup: Setup, device: torch.device, columns: Sequence[int], chunk: int) -> Kernels:
    """The named backend, else on cuda the Triton kernels if they take the run (columns: of each band's feed-forward).

    Raises UsageError for a named backend or dtype that nothing here can run.
    """
    settings, backend = setup.settings, setup.backend
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    named = settings.chunkwise_backend is not None or own_backend(setup.config) is not None
    if device.type == "cuda":
        # Other machines' GPUs are not known here: who names the kernels says that they are right, and actors look.
        capability = _capability() if setup.head is None else CAPABILITY if named else None
        why = misfit(Asked(setup.config, columns, chunk, dtype, capability))
    else:
        why = f"the Triton kernels are for cuda, and the device is {device.type}"
    if backend.kernel == KERNEL and why is not None:
        raise UsageError(
            f"{settings.named('chunkwise_backend')} is {backend.name!r}, but {why}; use "
            f"`chunkwise_backend={backend.executor}_compiled_chunks`, or leave it out"
        )
    if not named and why is None:
        backend = chunkwise_backend(f"{backend.executor}_{KERNEL}")
    if settings.dtype == "float8" and backend.kernel != KERNEL:
        why = why or f"{backend.name} has no float8"
        raise UsageError(f"{settings.named('dtype')} is 'float8', but {why}; use bfloat16")
    return Kernels(backend, None if named or device.type != "cuda" else why)


def _capability() -> tuple[int, int] | None:
    """The compute capability of this machine's GPU; None if it has none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def choose_graphs(settings: Settings, backend: Backend, device: torch.device, bands: int) -> str | None:
    """Why decoding is not captured in CUDA graphs; None if it is. Raises UsageError if a flag has no effect."""
    why = None
    if device.type != "cuda":
        why = f"the device is {device.type}"
    elif not backend.compiled:
        why = f"{backend.name} is not captured"
    elif bands > 1:
        why = f"{bands} bands add up on several streams, which is not captured"
    if why and settings.source("cuda_graphs").kind == "flag":
        raise UsageError(f"{settings.named('cuda_graphs')} has no effect: {why}; leave it out")
    return why or (None if settings.cuda_graphs else "not wanted")
