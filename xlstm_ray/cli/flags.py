"""The library's fields as flags: every text of the library for the terminal goes through `in_flags`."""

import re
from inspect import Parameter

from typer.models import OptionInfo

from xlstm_ray.errors import FIELD
from xlstm_ray.settings import table

# Flags by the library's names: options with another name are here, `know` adds all options of commands.
_FLAGS = {
    "append": "--append TEXT or --append-file FILE",
    "autoscale_again": "--autoscale again",
    "state": "--state-in",
    "url": "--url",
    "workloads": "--workloads",
}


def know(parameters: list[Parameter]) -> None:
    """Learn a command's options."""
    for parameter in parameters:
        for option in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(option, OptionInfo):
                words = [option.default, *(option.param_decls or ())]  # typer may move the first flag into `default`
                _FLAGS.setdefault(parameter.name, next(str(word) for word in words if str(word).startswith("--")))


def in_flags(text: str) -> str:
    """The text with each marked field as its flag: `tile_size` as --tile-size, `force=True` as --force."""
    return FIELD.sub(_flag, text)


def _flag(field: re.Match[str]) -> str:
    name, value = field.groups()
    row = table().get(name)
    flags = _FLAGS.get(name) or (row.flags if row else None)
    if flags is None:  # it has only a variable, or is not a name of ours
        return row.env if row else field[0]
    yes, _, no = flags.partition("/")
    if value in (None, "True", "False"):
        return no if value == "False" else yes
    return f"{yes} {value}"
