"""xlstm-ray: prefill prompts of any length through xLSTM language models, in flat memory.

import xlstm_ray
lm = xlstm_ray.load()
result = lm.prefill("The capital of France is")
result.state.save("france.state")
print("".join(lm.generate(state=result.state, max_new_tokens=8)))
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from xlstm_ray.settings import unknown_variables
from xlstm_ray.threads import calm_threads

if TYPE_CHECKING:
    from pathlib import Path

    from xlstm_ray.engine.engine import Engine
    from xlstm_ray.engine.request import Request
    from xlstm_ray.engine.result import PrefillResult
    from xlstm_ray.sampling import Sampling
    from xlstm_ray.state import RecurrentState

__all__ = ["Engine", "PrefillResult", "RecurrentState", "Request", "Sampling", "load"]
__version__ = "0.1.0"

calm_threads()  # here: the package is imported before its modules, and so before torch, in every process

_HOME = {
    "Engine": "engine.engine",
    "PrefillResult": "engine.result",
    "RecurrentState": "state",
    "Request": "engine.request",
    "Sampling": "sampling",
}


def load(model: "str | Path | None" = None, **options: Any) -> "Engine":
    """Load a model: a directory, or "owner/name[@revision]" on the Hugging Face hub. None: the demo model.


    options: the settings of `Settings`, as the flags of the command line (device, dtype, chunkwise_backend, tile_size,
    chunk_size, heads_per_band, workers, ...). Raises errors of xlstm_ray.errors, each one line for the user.
    """
    from xlstm_ray.choose import setup_of
    from xlstm_ray.engine.engine import Engine

    for note in unknown_variables():
        warnings.warn(note, stacklevel=2)
    setup = setup_of(model=model, **options)
    setup.settings.require_output()
    return Engine(setup)


def __getattr__(name: str) -> object:
    """torch is imported with the first name that needs it, so that `xlstm-ray --help` answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"xlstm_ray.{_HOME[name]}"), name)
