"""Daemons behind proxies that cut, reset, delay, stall, throttle and refuse: afterwards all is as before.

Owns the plan's course. Each daemon is announced at its proxy's address, so every link goes through the proxy of the one that was
dialled. Idea: catalogue D8 (a churning proxy), M (faults of links).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.proxy import Fault, Proxy, plan
from tests.soak.counts import Outcome
from tests.soak.daemon import Daemon, SoakError, Usage
from tests.soak.swarm import Swarm, swarm

FAULTS = "proxy faults"
HEALED_S_MAX = 150.0  # back offs reach a minute, and the machine may be loaded
BACK_S_MAX = 60.0  # for descriptors and threads: closed links linger for some deadlines of ten seconds
FILES_MORE_MAX = 4  # descriptors above the baseline: a link that is being renewed, a question at the control socket
RESIDENT_MORE_MAX = 48 << 20  # bytes above the baseline (guess: caches of code that only faults run, and of the allocator)


@contextmanager
def behind_proxies(folder: Path, victims: int, **settings: Any) -> Iterator[tuple[Swarm, list[Proxy]]]:
    """A swarm in which each daemon is reached through a proxy of its own, in the order of `Swarm.all`."""
    names = [*(f"victim{i}" for i in range(victims)), "observer"]
    with ExitStack() as stack:
        proxies = [Proxy() for _ in names]
        for proxy in proxies:
            stack.callback(proxy.close)
        more = {name: _addresses(proxy) for name, proxy in zip(names, proxies, strict=True)}
        yield stack.enter_context(swarm(folder, victims, more, **settings)), proxies


def _addresses(proxy: Proxy) -> dict[str, str]:
    """Where a daemon listens, and what it tells others instead."""
    proxy.target = _free_port()
    return {"listen": f"/ip4/127.0.0.1/tcp/{proxy.target}", "announce": f"/ip4/127.0.0.1/tcp/{proxy.port}"}


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def faulty(made: Swarm, proxies: list[Proxy], seconds: float, outcome: Outcome, seed: int = 0) -> Outcome:
    """Faults for `seconds`, then the judgement."""
    made.learning(60.0)
    before = {one.name: one.usage() for one in made.all}
    carried = sum(proxy.carried for proxy in proxies)
    count = _misbehave(proxies, seconds, seed)
    for proxy in proxies:
        proxy.apply(Fault())
    began = time.monotonic()
    complaints = [*_healed(made), *made.errors(), *made.wrong()]
    healed_s = time.monotonic() - began
    complaints += [complaint for one in made.all if (complaint := _back(one, before[one.name]))]
    outcome.tried(FAULTS, "; ".join(complaints), count)
    outcome.figures |= {
        "faults": count,
        "healed_s": round(healed_s, 1),
        "connections": sum(proxy.connections for proxy in proxies),
        "megabytes": round((sum(proxy.carried for proxy in proxies) - carried) / 1e6, 1),
    }
    return outcome


def _misbehave(proxies: list[Proxy], seconds: float, seed: int) -> int:
    """Play the plan in real time; how many faults there were."""
    began, never, count = time.monotonic(), threading.Event(), 0
    ends: list[tuple[float, int]] = []
    for at, number, fault in plan(seed, seconds, len(proxies)):
        while ends and ends[0][0] <= at:  # faults that are over by then
            when, which = ends.pop(0)
            never.wait(max(0.0, began + when - time.monotonic()))
            proxies[which].apply(Fault())
        never.wait(max(0.0, began + at - time.monotonic()))
        proxies[number].apply(fault)
        ends = sorted([*(end for end in ends if end[1] != number), (at + fault.seconds, number)])
        count += 1
    never.wait(max(0.0, began + seconds - time.monotonic()))
    return count


def _healed(made: Swarm) -> list[str]:
    """What is wrong after the last fault."""
    try:
        made.connected(HEALED_S_MAX)
        made.learning(60.0)
    except SoakError as error:
        return [str(error)]
    return []


def _back(one: Daemon, before: Usage) -> str:
    """Wait until it holds what it held before; what it holds too much, or ''."""
    end = time.monotonic() + BACK_S_MAX
    while True:
        now = one.usage()
        files, resident = now.files - before.files, now.resident - before.resident
        if files <= FILES_MORE_MAX and now.threads <= before.threads + 1 and resident <= RESIDENT_MORE_MAX:
            return ""
        if time.monotonic() > end:
            return f"{one.name} holds {files} descriptors, {now.threads - before.threads} threads, {resident >> 20} MiB more"
        threading.Event().wait(0.5)
