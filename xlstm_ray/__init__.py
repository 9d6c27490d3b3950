"""xlstm-ray: prefill prompts of any length through xLSTM language models, in flat memory.

import xlstm_ray
lm = xlstm_ray.load()
result = lm.prefill("The capital of France is")
result.state.save("france.state")
print("".join(lm.generate(state=result.state, max_new_tokens=8)))
"""

from importlib import import_module
from typing import TYPE_CHECKING

from xlstm_ray.settings import calm_threads

if TYPE_CHECKING:
    from xlstm_ray.engine.engine import Engine, load
    from xlstm_ray.engine.result import PrefillResult
    from xlstm_ray.state import RecurrentState

__all__ = ["Engine", "PrefillResult", "RecurrentState", "load"]
__version__ = "0.1.0"

calm_threads()  # here, since the package comes before its modules, and so before torch, in every process

_HOME = {
    "Engine": "engine.engine",
    "PrefillResult": "engine.result",
    "load": "engine.engine",
    "RecurrentState": "state",
}


def __getattr__(name: str) -> object:
    """torch is imported with the first name that needs it, so that `xlstm-ray --help` answers at once."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"xlstm_ray.{_HOME[name]}"), name)
