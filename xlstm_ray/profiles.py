"""Sets of settings by a name: what `profile` stands for."""

from typing import Any

PROFILES: dict[str, dict[str, Any]] = {
    # A Mac with 256 GB: throughput first, a warning only near the limit, no shrinking.
    "high-memory-256gb": {
        "mem_action": ("warn",),
        "mem_soft_mb": 215_000,
        "mem_hard_mb": 235_000,
        "shrink_on_soft": False,
        "chunk_size": 64,
        "heads_per_band": 4,
    }
}
