"""Ray's life cycle: start a head of our own, connect to one, say what is there, and stop exactly what we started.

A managed head is three layers, all in one POSIX session of their own:

    guard (guard.py, a few lines of Python)  ->  ray start --head  ->  Ray's processes and the workers

The guard's pid is the session's id, so "ours" is a question to the kernel and not a search for names. `ray start` ends
when all run; the guard then watches GCS and raylet, without which no run can be, and notes which helpers have gone. It
watches the driver by pid and start time; when the driver is gone, however it ended, the guard takes the session down. A
head that stays (`up`, or a run with keep-alive) has the same guard, which then waits for `stop_head` or `down` instead.
What was started is recorded in `<state_dir>/heads/<id>.json`, written whole or not at all, before anything runs.
A record says on which machine its pids are, by the machine's own identity: its name is shown and never compared.

Only `connect` imports Ray. This room reads no settings; it passes the environment on to Ray, with token
authentication switched on and every listener on loopback.
"""
