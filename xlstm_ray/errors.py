"""One exception tree. The command line turns these into one line and their exit code; anything else is a bug."""

import re
import shlex
import sys
from importlib import metadata

# How a text names a setting or an argument: `temperature`, or with a value `temperature=0`. A caller from Python reads
# it as it stands; the command line shows the flag in its place (cli/flags.py).
FIELD = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


class XlstmRayError(Exception):
    """A user's mistake or a limit that was met: what was given, what is allowed, what to do. Exit code 1."""

    exit_code = 1


class UsageError(XlstmRayError):
    """An option or argument that cannot be honoured."""


class ConfigError(XlstmRayError):
    """config.json says something that this program cannot honour."""


class CheckpointError(XlstmRayError):
    """Weights or tokenizer files are missing, damaged, or not what the configuration describes."""


class ServiceError(XlstmRayError):
    """A service does not answer, or refuses. status: of its reply, 0 in the middle of one; None: there was none.

    code: its own word for the reason. retry_s: seconds after which it may be tried again.
    """

    def __init__(self, text: str, status: int | None = None, code: str | None = None, retry_s: float | None = None):
        super().__init__(text)
        self.status, self.code, self.retry_s = status, code, retry_s


class DownloadError(XlstmRayError):
    """A model cannot be downloaded from the hub, or is not in the cache."""


class StateError(XlstmRayError):
    """A saved state is damaged, or belongs to another model or prompt, or was made with other numerics."""


class OutputError(XlstmRayError):
    """A requested file cannot be written, or a file that this program did not write is in its place."""


class KernelError(XlstmRayError):
    """A kernel does not compile, or this device cannot run it. Compilation is strict: nothing falls back."""


class ParityError(XlstmRayError):
    """A kernel or backend is further from the reference than its tolerance allows."""


class EstimateError(XlstmRayError):
    """A measured run is further from its estimate than the tolerance allows."""


class RayError(XlstmRayError):
    """Ray is missing, does not start, does not answer, or is somebody else's."""


class GridLost(XlstmRayError):
    """Actors or nodes of the grid are gone and could not be replaced; what the last snapshot holds can be resumed."""

    exit_code = 4


class GridOutOfMemory(GridLost):
    """Ray ended an actor because its node ran out of memory; what the last snapshot holds can be resumed."""

    exit_code = 3


class ReplicaLost(XlstmRayError):
    """A replica of a service has ended with a request in work; another one takes the request when it is sent again."""

    exit_code = 4


class MemoryLimitError(XlstmRayError):
    """A run cannot fit, or went over its hard memory limit and was stopped at a tile boundary."""

    exit_code = 3


class Interrupted(XlstmRayError):
    """The run was stopped at a tile boundary by Ctrl-C or SIGTERM."""

    exit_code = 130


def one_line(text: object) -> str:
    """A library's message about a file as one printable line of moderate length: the message may quote the file."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))[:300]


def pip_install(*packages: str) -> str:
    """The command that installs packages into this process's environment, with the project's version bounds."""
    try:
        asked = [requirement.partition(";")[0].strip() for requirement in metadata.requires("xlstm-ray") or []]
    except metadata.PackageNotFoundError:  # on the PYTHONPATH, not installed
        asked = []
    wanted = [next((one for one in asked if re.match(rf"{name}(?![\w.-])", one)), name) for name in packages]
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.join(wanted)}"
