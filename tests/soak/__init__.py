"""Real daemons under what really happens to them: killed, stopped, paused, cut off, without room, for as long as one likes.

`python -m tests.soak [NAME …]` runs it; `tests/test_soak.py` is the short form. Each name is a file of its own here; what they
share is a daemon that can be started again (`daemon.py`), a swarm of them with one that takes notes (`swarm.py`, `observer.py`),
what lies on a disk (`disk.py`), when files change (`watch.py`) and the counting (`counts.py`).
"""
