"""Where actors live: in this process, on a head of our own, or on somebody's head."""

from enum import StrEnum

from xlstm_ray.errors import UsageError


class Mode(StrEnum):
    """Where the actors live: in this process, on a head of our own, or on somebody's head."""

    LOCAL = "local"
    MANAGED = "managed"
    ATTACHED = "attached"


def ray_mode(
    *,
    local_mode: bool,
    address: str | None = None,
    dashboard: bool = False,
    dashboard_port: int | None = None,
    keep_alive: bool = False,
) -> Mode:
    """Decide where actors live. Raises UsageError for options that exclude each other."""
    if dashboard_port is not None and not dashboard:
        raise UsageError(f"`ray_dashboard_port` {dashboard_port} without a dashboard: add `ray_dashboard=True`")
    if address is not None:
        if dashboard or keep_alive:
            field = "`ray_dashboard`" if dashboard else "`ray_keep_alive`"
            raise UsageError(f"{field} with `ray_address` {address}: that head is not ours to configure; leave one out")
        return Mode.ATTACHED
    if not local_mode:
        return Mode.MANAGED
    if dashboard:
        raise UsageError(
            "`ray_dashboard` in local mode: everything runs in this process and there is no Ray to look at; "
            "set XLSTM_RAY_LOCAL_MODE=0, or leave the dashboard out"
        )
    if keep_alive:
        raise UsageError(
            "`ray_keep_alive` in local mode: there is no Ray head to keep; set XLSTM_RAY_LOCAL_MODE=0, or leave it out"
        )
    return Mode.LOCAL
