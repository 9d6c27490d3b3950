"""The key that a caller gives. Never an argument of a command: other users of a machine can read those."""

import os
from pathlib import Path

from xlstm_ray.errors import UsageError

VARIABLES = "XLSTM_RAY_API_KEY", "OPENAI_API_KEY"  # the first that is set counts


def find_key(file: Path | None) -> str | None:
    """The key in the first line of the file, or a variable's value; None: there is neither. Raises UsageError."""
    found, place = next(
        ((os.environ[name], f"the variable {name}") for name in VARIABLES if os.environ.get(name)), ("", "")
    )
    if file is not None:
        place = f"`api_key_file` {file}"
        try:
            lines = file.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as err:
            why = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
            raise UsageError(f"{place}: cannot be read ({why})") from None
        found = next((line.split()[0] for line in lines if line.strip()), "")  # a service's file says more of a key
        if not found:
            raise UsageError(f"{place}: is empty; its first line is the key")
    if not (found.isascii() and found.isprintable() and " " not in found):
        raise UsageError(f"{place}: is not a key; allowed: letters, digits and signs of ASCII, without spaces")
    return found or None
