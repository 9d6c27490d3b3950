"""Ray's internals that we use; Ray may change them at any time. tests/supervisor/test_ray_inside.py has the list.

Ray has no public switch for any of them. Import this module only when Ray may be imported.
"""

import atexit
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def print_messages_with(show: Callable[..., None]) -> None:
    """`show(data, ignore_prefix=...)` gets the cluster's messages, which Ray would print to standard output."""
    from ray._private import worker

    worker.print_to_stdstream = show


def forget_shutdown_at_exit() -> None:
    """Keep Ray from disconnecting when the interpreter ends."""
    from ray._private import worker

    atexit.unregister(worker.shutdown)


def job_config(ray: ModuleType, metadata: dict[str, str], path: list[str]) -> Any:
    """The configuration of a job whose workers import from `path` and not from this process's folder."""
    return ray.job_config.JobConfig(metadata=metadata, _client_job=True, _py_driver_sys_path=path)


def session_dir() -> Path | None:
    """The folder on this machine that Ray writes its logs and spilled objects into; None: it is not connected."""
    from ray._private import worker

    node = worker._global_node
    return None if node is None else Path(node.get_session_dir_path())


def job_has_ended(job: str) -> bool:
    """Whether the program of this job (its id as Ray shows it) is gone, in whatever way it ended. Asks the head."""
    from ray._private import state

    return not any(one["JobID"] == job and not one["IsDead"] for one in state.jobs())
