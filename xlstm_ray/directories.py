"""Where this user's files of the program live: caches, compiled code, records of Ray heads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from platformdirs import user_cache_path
from platformdirs.unix import Unix

from xlstm_ray.errors import RayError

NAME = "xlstm-ray"
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable


def cache_dir() -> Path:
    """The directory of this program's caches: XDG_CACHE_HOME, else the system's usual place."""
    try:
        return user_cache_path(NAME)
    except RuntimeError:  # neither HOME nor an entry in the password file, as in containers
        return Path(gettempdir()) / f"{NAME}-{os.getuid()}"


def compile_cache_dir() -> Path:
    """The directory of torch's compiled code: from its environment variable, else its default."""
    try:
        user = getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a user without a name, as in containers
        user = f"uid_{os.getuid()}"
    default = Path(gettempdir()) / f"torchinductor_{user}"
    return Path(os.environ.get(COMPILE_CACHE, default)).absolute()


@contextmanager
def fresh_compile_cache() -> Iterator[Path]:
    """Within it, torch compiles into a directory of its own, which is removed at the end."""
    before, place = os.environ.get(COMPILE_CACHE), compile_cache_dir()
    with TemporaryDirectory(prefix="warm-up-", dir=place) as directory:
        os.environ[COMPILE_CACHE] = directory
        try:
            yield Path(directory)
        finally:
            del os.environ[COMPILE_CACHE]
            os.environ.update({} if before is None else {COMPILE_CACHE: before})


def default_state_dir() -> Path:
    """The default directory of Ray's records and token: XDG_STATE_HOME, else .local/state in the home directory.

    macOS has the same place: it is alike on all machines of a cluster, and its path has no space that a shell splits.
    Raises RayError if this user has no home directory.
    """
    try:
        return Unix(NAME).user_state_path
    except RuntimeError:
        raise RayError(
            "this user has no home directory for Ray's records: give a folder with `ray_state_dir` "
            "(XLSTM_RAY_STATE_DIR), or set HOME"
        ) from None
