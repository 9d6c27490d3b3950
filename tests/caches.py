"""What tests compile is kept for later runs. Importing this sets the variables of it, for programs of tests too.

C++ compilation is most of a first run's time. And g++ gets torch's headers compiled (tests/compiler/g++): a file takes
0.6 s of a core instead of 2.
"""

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

# The modules of this checkout, too, also where the environment says that Python keeps none: three seconds a worker.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xlstm-ray" / "tests"
COMPILER = Path(__file__).parent / "compiler" / "g++"

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
if sys.platform == "linux" and shutil.which("g++") not in (None, str(COMPILER)):
    os.environ["PATH"] = f"{COMPILER.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.setdefault("TESTS_HEADERS", str(CACHE / "headers" / version("torch")))
