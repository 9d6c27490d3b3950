"""python -m metal SCRIPT [ARGUMENTS ...], with tests/ on the path: runs a script with the simulated mps device."""

import gc
import runpy
import sys

from .simulator import simulator

gc.freeze()  # as in tests/conftest.py
gc.set_threshold(50_000, 20, 20)

sys.argv = sys.argv[1:]
with simulator().installed():
    runpy.run_path(sys.argv[0], run_name="__main__")
