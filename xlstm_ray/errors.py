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


class DownloadError(XlstmRayError):
    """A model could not be had from the hub, or is not in the cache."""


class StateError(XlstmRayError):
    """A saved state is damaged, or belongs to another model or prompt, or was made with other numerics."""


class OutputError(XlstmRayError):
    """A file that was asked for cannot be written, or its place is taken by what this program did not write."""


class KernelError(XlstmRayError):
    """A kernel does not compile or is not to be had on this device. Compilation is strict: nothing falls back."""


class ParityError(XlstmRayError):
    """A kernel or backend is further from the reference than its tolerance allows."""


class EstimateError(XlstmRayError):
    """A measured run is further from its estimate than is allowed."""


class RayError(XlstmRayError):
    """Ray is missing, does not start, does not answer, or is somebody else's."""


class GridLost(XlstmRayError):
    """Actors or nodes of the grid are gone and could not be replaced; what the last snapshot holds can be resumed."""

    exit_code = 4


class GridOutOfMemory(GridLost):
    """Ray ended an actor because its node ran out of memory; what the last snapshot holds can be resumed."""

    exit_code = 3


class MemoryLimitError(XlstmRayError):
    """A run cannot fit, or came over its hard limit of memory and was stopped at a tile boundary."""

    exit_code = 3


class Interrupted(XlstmRayError):
    """The run was stopped at a tile boundary by Ctrl-C or SIGTERM."""

    exit_code = 130


def one_line(text: object) -> str:
    """What a library says about a file in one printable line of moderate length: it may quote the file."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))[:300]


def pip_install(package: str) -> str:
    """The command that puts a package into the environment of this very process, as the project asks for it."""
    try:
        asked = [requirement.partition(";")[0].strip() for requirement in metadata.requires("xlstm-ray") or []]
    except metadata.PackageNotFoundError:  # on the PYTHONPATH, not installed
        asked = []
    wanted = next((one for one in asked if re.match(rf"{package}(?![\w.-])", one)), package)
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(wanted)}"
