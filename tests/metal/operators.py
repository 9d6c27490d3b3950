"""Which operators torch has MPS kernels for: its own table, which comes with every build of torch."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

import yaml


@functools.cache
def operators_with_mps_kernels() -> frozenset[str]:
    """Names such as "aten::bmm" or "aten::add.Tensor".

    An operator has one if the MPS key stands in its dispatch table, or in that of the operator to which a structured
    one delegates. Composite operators need none and are not in the set: they run as the operators they are made of.
    """
    table = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries: dict[str, dict[str, Any]] = {entry["func"].split("(")[0]: entry for entry in yaml.load(table, loader)}

    def has_mps(entry: dict[str, Any]) -> bool:
        if delegate := entry.get("structured_delegate"):
            return has_mps(entries[delegate])
        return any("MPS" in keys.replace(" ", "").split(",") for keys in entry.get("dispatch", {}))

    return frozenset(f"aten::{name}" for name, entry in entries.items() if has_mps(entry))
