"""What is said to libraries before torch is loaded."""

import os
import sys


def calm_threads() -> None:
    """Let OpenMP's threads sleep soon while they wait for each other. Before torch is loaded, or it has no effect.

    By default they spin 300,000 times: if another program works too, each takes the core that the other one waits for.
    10,000 turns, some 0.3 ms, are as fast on a quiet machine, where 1,000 are 7 % slower. What the user has set stays.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
