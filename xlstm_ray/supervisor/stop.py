"""Stop exactly what we started."""

import signal
import subprocess
from pathlib import Path

from xlstm_ray.errors import RayError
from xlstm_ray.supervisor.guard import end_processes, remove_head
from xlstm_ray.supervisor.processes import GRACE_S, find, send_signal, wait_for_end
from xlstm_ray.supervisor.records import Head, all_heads, is_here, read_record, record_path, session_of, was_here

child_guards: dict[str, subprocess.Popen[bytes]] = {}  # guards that are children of this process; it must reap them


def down(state_dir: Path, head_id: str | None = None) -> list[Head]:
    """Stop our heads and clear their records; returns those heads.

    Without `head_id`: heads that stay, orphans, and records of dead heads. A head whose run is alive is stopped only if
    it is named. Raises RayError for an unknown id, or if a process does not end.
    """
    heads = [h for h in all_heads(state_dir) if is_here(h) or was_here(h)]
    if head_id is not None:
        known = ", ".join(h.id for h in heads) or "none"
        heads = [h for h in heads if h.id == head_id]
        if not heads:
            raise RayError(f"this machine has no head {head_id} of this project; there are: {known}")
    stopped = []
    for head in heads:
        if head_id is None and head.mode == "run" and is_here(head) and find(head.driver) is not None:
            continue
        stop_head(head, state_dir)
        stopped.append(head)
    return stopped


def stop_head(head: Head, state_dir: Path) -> None:
    """Stop one of our heads and remove its record and folder. It is not an error if the head is gone already.

    Takes 2 to 5 s. Only processes of the recorded session are signalled. Raises RayError when one of them survives.
    """
    record = record_path(state_dir, head.id)
    head = read_record(record) or head  # the guard may have completed it since
    guard = find(head.guard) if head.guard and is_here(head) else None
    if guard is not None:
        send_signal([guard], signal.SIGTERM)
        wait_for_end([guard], 4 * GRACE_S)
    child = child_guards.pop(head.id, None)
    if child is not None and head.guard is None:  # its guard has not written the record yet
        child.terminate()
    left = end_processes(lambda: session_of(head))
    if child is not None:
        child.wait(4 * GRACE_S)  # reap it
    if left:
        raise RayError(f"head {head.id}: processes {', '.join(str(p.pid) for p in left)} do not end; stop them by hand")
    remove_head(record, head)
