"""python -m metal SCRIPT [ARGUMENTS ...], with tests/ on the path: runs a script with the simulated mps device."""

import gc
import runpy
import sys

from xlstm_ray.threads import collect_seldom

from .simulator import simulator

gc.freeze()  # as in tests/conftest.py
collect_seldom()

sys.argv = sys.argv[1:]
with simulator().installed():
    runpy.run_path(sys.argv[0], run_name="__main__")
