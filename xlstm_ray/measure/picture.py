"""Pictures of measurements, by matplotlib."""

from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

from xlstm_ray.errors import UsageError, pip_install
from xlstm_ray.files import PICTURE, require_replaceable, write_whole


def pyplot() -> ModuleType:
    """matplotlib without a screen. Raises UsageError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            f"`png` draws with matplotlib, which is not installed; {pip_install('matplotlib')} installs it, or leave "
            "`png` out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path, maker: str, *, overwrite: bool) -> None:
    """Write a figure, the whole file or none, and close it. maker: the command that drew it. Raises UsageError."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=120, metadata={"Software": maker})
    pyplot().close(figure)
    require_replaceable(path, PICTURE, overwrite=overwrite, option="`png`")
    try:
        write_whole(path, data.getvalue())
    except OSError as err:
        raise UsageError(f"`png` {path}: cannot be written ({err.strerror})") from None
