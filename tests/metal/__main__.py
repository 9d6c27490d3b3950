"""python -m metal SCRIPT [ARGUMENTS ...], with tests/ on the path: runs a script with the simulated mps device."""

import runpy
import sys

from .simulator import simulator

sys.argv = sys.argv[1:]
with simulator().installed():
    runpy.run_path(sys.argv[0], run_name="__main__")
