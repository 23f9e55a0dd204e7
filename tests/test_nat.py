"""Behind routers: network namespaces with address translation between (`tests/nat_lab.py`), skipped where rights are missing.

Real daemons exchange models through a public relay of another swarm, and then directly, through the hole that they punch. Where
routers map each destination to another port there is no hole, and the relay goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from p2pnode.control import ask
from p2pnode.transport import CIRCUIT
from tests.nat_lab import CONE, PUBLIC, SYMMETRIC, Lab, Place, Router, lab, why_not
from tests.processes import P2PNODE, ROOT, environment, wait_for

WHY_NOT = why_not()
needs_rights = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
LISTEN = "/ip4/0.0.0.0/tcp/4001"
QUIET = ("--set", "mdns=false", "--set", "upnp=false")
BUSY = ("--set", "cycle_s=0.02", "--set", "threads=1", "--set", "measure_alone=false")
DIRECT_S_MAX = 40.0  # on a machine that does much else; else 3
BOTH_S_MAX = 60.0  # likewise; else 5


Fits = Callable[[dict[str, Any]], bool]


class Program:
    """A process in a place. What it prints on stdout are JSON lines."""

    def __init__(self, stack: ExitStack, place: Place, command: tuple[str, ...], log: Path) -> None:
        self.said: list[dict[str, Any]] = []
        self._news = threading.Condition()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                place.inside(command), cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True,
            )  # fmt: skip
        stack.callback(self._end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.said.append(json.loads(line))
                self._news.notify_all()

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self, fits: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
        """The first thing said that fits."""
        with self._news:
            assert self._news.wait_for(lambda: any(map(fits, self.said)), seconds), self.said
            return next(filter(fits, self.said))

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Here(Place):
    """This machine, for who has no rights to make another."""

    def inside(self, command: Sequence[str]) -> list[str]:
        return list(command)


class Town:
    """A lab, and the programs in it."""

    def __init__(self, made: Lab, stack: ExitStack, folder: Path) -> None:
        self.lab, self._stack, self._folder = made, stack, folder

    def peer(self, number: int, place: Place, *arguments: str) -> Program:
        """A bare transport; it is ready when it has said so."""
        command = (sys.executable, "-m", "tests.nat_peer", str(number), *arguments)
        return Program(self._stack, place, command, self._folder / f"{number}.log")

    def relays(self, count: int) -> list[str]:
        """Public relays, and where they are."""
        made = [self.peer(9 - i, self.lab.public, f"/ip4/{PUBLIC}/tcp/{4001 + i}", "relay") for i in range(count)]
        return [ready(one)[0] for one in made]

    def daemon(self, name: str, place: Place, *arguments: str) -> dict[str, Any]:
        """A real daemon, and what it printed at its start."""
        command = (*P2PNODE, "run", "--json", "--data-dir", str(self._folder / name), *QUIET, *BUSY, *arguments)
        return Program(self._stack, place, command, self._folder / f"{name}.log").hear(lambda said: "peer_id" in said)

    def status(self, name: str) -> dict[str, Any]:
        """What the daemon says of itself."""
        return ask(self._folder / name, {"do": "status"})


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    with lab() as made, ExitStack() as stack:
        yield Town(made, stack, tmp_path)


def ready(program: Program) -> list[str]:
    """Its addresses, once it is."""
    return list(program.hear(lambda said: said["event"] == "ready")["addresses"])


def through(program: Program) -> str:
    """Its address at a relay."""
    return next(address for address in ready(program) if CIRCUIT in address)


def ups_and_downs(program: Program) -> list[str]:
    return [said["event"] for said in program.said if said["event"] in ("up", "down")]


def links(status: dict[str, Any]) -> list[str]:
    return ["relayed" if CIRCUIT in peer["address"] else "direct" for peer in status["peer_list"]]


def meet(town: Town, helper: Place, one: Place, two: Place, at: str, *more: str) -> Callable[[Fits], None]:
    """Start two daemons that know each other by invitation only, and a helper of another swarm. Waits until both fit."""
    public = town.daemon("helper", helper, "--relay", "--listen", at, "--set", "swarm=another")
    via = ("--via", public["addresses"][0], "--shard-count", "2", *more)
    first = town.daemon("first", one, *via)
    assert CIRCUIT in first["addresses"][0], "known at the start, so that the invitation says it"
    town.daemon("second", two, *via, "--shard-index", "1", "--join", first["join"])

    def until(fits: Fits) -> None:
        wait_for(lambda: all(fits(town.status(name)) for name in ("first", "second")), BOTH_S_MAX, "what both should be")

    return until


@needs_rights
def test_two_daemons_behind_two_routers_exchange_models_and_make_a_direct_link(town: Town) -> None:
    homes = town.lab.home(CONE), town.lab.home(CONE)
    until = meet(town, town.lab.public, *homes, f"/ip4/{PUBLIC}/tcp/4001", "--listen", LISTEN)
    until(lambda status: status["merges"] > 0)
    until(lambda status: links(status) == ["direct"])
    merges = max(town.status(name)["merges"] for name in ("first", "second"))
    until(lambda status: status["merges"] > merges)


@pytest.mark.skipif(not WHY_NOT, reason="the namespaces show more")
def test_without_rights_two_daemons_exchange_models_through_a_relay_on_loopback(tmp_path: Path) -> None:
    with ExitStack() as stack:
        here = Here("here", "127.0.0.1", 0)
        unreachable = ("--listen", "/ip4/127.0.0.1/tcp/0", "--set", "announce=/ip4/127.0.0.1/tcp/1")
        until = meet(Town(Lab(here, stack), stack, tmp_path), here, here, here, "/ip4/127.0.0.1/tcp/0", *unreachable)
        until(lambda status: status["merges"] > 0 and links(status) == ["relayed"])


@needs_rights
def test_behind_a_router_that_maps_each_destination_anew_the_relay_goes_on(town: Town) -> None:
    relays = town.relays(2)
    one = town.peer(1, town.lab.home(SYMMETRIC), LISTEN, *relays)
    two = town.peer(2, town.lab.home(CONE), LISTEN, *relays)
    ready(one)
    one.say(f"dial {through(two)}")
    up = one.hear(lambda said: said["event"] == "up")
    assert up["relayed"]
    time.sleep(1.0)  # for whoever wants to punch a hole
    one.say(f"send {up['peer']} 8")

    def all_came() -> bool:
        two.say("status")
        return any(sum(said["frames"].values()) == 8 for said in two.said if said["event"] == "status")

    def all_said() -> bool:
        one.say("status")
        said = [(said["reachability"], said["mapping"]) for said in one.said if said["event"] == "status"]
        return ("private", "differs") in said

    wait_for(all_came, 10, "what was sent")
    wait_for(all_said, 20, "what relays say of our router")
    assert ups_and_downs(one) == ["up"]


@needs_rights
def test_who_can_be_reached_is_dialled_back_through_the_relay(town: Town) -> None:
    (relay,) = town.relays(1)
    open_ = town.peer(1, town.lab.public, f"/ip4/{PUBLIC}/tcp/4003", relay)
    hidden = town.peer(2, town.lab.home(SYMMETRIC), LISTEN, relay)
    assert not any(CIRCUIT in address for address in ready(open_)), "it is public"
    open_.say(f"dial {through(hidden)}")
    open_.hear(lambda said: said["event"] == "up" and said["relayed"])
    for one in (open_, hidden):
        one.hear(lambda said: said["event"] == "up" and not said["relayed"], DIRECT_S_MAX)
        assert ups_and_downs(one) == ["up", "down", "up"]


def test_the_router_maps_and_filters_as_its_kind_says() -> None:
    inside, relay, other = b"\xc0\xa8\x01\x02", b"\x2d\x00\x00\x01", b"\x2d\x00\x00\x02"

    def packet(source: bytes, source_port: int, target: bytes, port: int) -> bytearray:
        head = bytes.fromhex("4500002800000000400600 00".replace(" ", "")) + source + target
        return bytearray(head + source_port.to_bytes(2, "big") + port.to_bytes(2, "big") + bytes(16))

    for kind, same in ((CONE, True), (SYMMETRIC, False)):
        router = Router(kind, "45.0.1.1")
        seen = []
        for target in (relay, other):
            out = packet(inside, 5555, target, 4001)
            assert router.outward(out)
            seen.append(int.from_bytes(out[20:22], "big"))
            assert out[12:16] == b"\x2d\x00\x01\x01"
        assert (seen[0] == seen[1]) is same
        back = packet(relay, 4001, b"\x2d\x00\x01\x01", seen[0])
        assert router.inward(back)
        assert back[16:20] == inside
        assert back[22:24] == (5555).to_bytes(2, "big")
        assert not router.inward(packet(relay, 4002, b"\x2d\x00\x01\x01", seen[0])), "nobody has written there"
