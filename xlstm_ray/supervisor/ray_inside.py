"""The inner parts of Ray that we use, which Ray may change at will. tests/supervisor/test_ray_inside.py has the list.

Each is here because Ray has no public switch for it. Import this only once Ray may be imported.
"""

import atexit
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def print_messages_with(show: Callable[..., None]) -> None:
    """`show(data, ignore_prefix=...)` gets what the cluster has to say, which Ray would write to standard output."""
    from ray._private import worker

    worker.print_to_stdstream = show


def forget_shutdown_at_exit() -> None:
    """Ray does not disconnect as the interpreter ends."""
    from ray._private import worker

    atexit.unregister(worker.shutdown)


def job_config(ray: ModuleType, metadata: dict[str, str], path: list[str]) -> Any:
    """A job whose workers import from `path`, and not from the folder that this process was started in."""
    return ray.job_config.JobConfig(metadata=metadata, _client_job=True, _py_driver_sys_path=path)


def session_dir() -> Path | None:
    """The folder on this machine that Ray writes its logs and spilled objects into; None: it is not connected."""
    from ray._private import worker

    node = worker._global_node
    return None if node is None else Path(node.get_session_dir_path())
