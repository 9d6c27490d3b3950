"""Ray's life cycle: start a head, connect to one, show what runs, and stop exactly what we started.

A head that we start has three layers, all in one POSIX session:

    guard (guard.py, a few lines of Python)  ->  ray start --head  ->  Ray's processes and the workers

The guard's pid is the session's id, so the kernel tells which processes are ours; nothing searches for names. `ray
start` ends when all programs run. Then the guard watches GCS and raylet, which every run needs, and notes helpers that
end. It watches the driver by pid and start time. When the driver is gone for any reason, the guard ends the session. A
head that stays (`up`, or a run with keep-alive) has the same guard, which waits for `stop_head` or `down` instead.
A head is recorded in `<state_dir>/heads/<id>.json`, written whole or not at all, before anything runs.
A record has the identity of its pids' machine; the machine's name is shown and never compared.

Only `connect` imports Ray. This room reads no settings. It passes the environment to Ray, with token
authentication on and every listener on loopback.
"""
