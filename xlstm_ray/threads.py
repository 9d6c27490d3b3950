"""What a process of ours sets before torch is loaded, and once its model is."""

import gc
import os
import sys


def calm_threads() -> None:
    """Let OpenMP's threads sleep soon while they wait for each other. Before torch is loaded, or it has no effect.

    By default they spin 300,000 times: if another program works too, each takes the core that the other one waits for.
    10,000 turns, some 0.3 ms, are as fast on a quiet machine, where 1,000 are 7 % slower. What the user has set stays.
    """
    if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


def collect_seldom() -> None:
    """Let Python look for garbage less often, in a process of ours: a command that compiles starts 0.6 s earlier.

    By default it looks at each 700 new objects, and torch with its compiler makes half a million, which stay.
    """
    gc.set_threshold(50_000, 20, 20)


def settle() -> None:
    """Have the garbage collector pass over all that is there now: it stays as long as the process does.

    Else a full collection looks at the half million objects of torch and its compiler: all wait, for 0.1 to 0.2 s.
    """
    gc.collect()
    gc.freeze()
