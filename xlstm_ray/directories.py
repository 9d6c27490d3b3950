"""Where this user's files of the program live: caches, compiled code, records of Ray heads."""

import os
import sys
from getpass import getuser
from pathlib import Path
from tempfile import gettempdir

from xlstm_ray.errors import RayError


def cache_dir() -> Path:
    """Where this user's caches of the program live."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")) / "xlstm-ray"
    except RuntimeError:  # neither HOME nor an entry in the password file, as in containers
        return Path(gettempdir()) / f"xlstm-ray-{os.getuid()}"


def compile_cache_dir() -> Path:
    """Where torch keeps what it has compiled: its variable, else its default."""
    try:
        user = getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a user without a name, as in containers
        user = f"uid_{os.getuid()}"
    default = Path(gettempdir()) / f"torchinductor_{user}"
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", default)).absolute()


def default_state_dir() -> Path:
    """Where records and the token live unless told otherwise. Raises RayError where this user has no home."""
    try:
        return Path.home() / ".local" / "state" / "xlstm-ray"
    except RuntimeError:
        raise RayError(
            "this user has no home directory for Ray's records: give a folder with --ray-state-dir "
            "(XLSTM_RAY_STATE_DIR), or set HOME"
        ) from None
