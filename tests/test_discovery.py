"""Where peers may be: sources that fail, hang, lie or come back, and none of them the others' business."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from p2pnode import discovery as discovery_module
from p2pnode.discovery import ADDRESSES_MAX, GIVEN_MAX, HEARD_MAX, Asked, Discovery, Given, Hear, Heard, usable
from protocols import effects as fx
from protocols import events as ev
from protocols.identity import Identity, peer_text
from protocols.limits import LAPTOP
from tests.core_harness import Bench
from tests.core_harness import address as core_address
from tests.core_harness import identity as core_identity

ME = Identity(b"\x63" * 32).peer


def address(number: int, where: str = "/ip4/192.0.2.7/tcp/4001") -> str:
    """An address of peer `number`."""
    return f"{where}/p2p/{peer_text(Identity(number.to_bytes(32, 'big')).peer)}"


A, B, C = address(1), address(2), address(3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_module, "AGAIN_S_MIN", 0.01)
    monkeypatch.setattr(discovery_module, "AGAIN_S_MAX", 0.08)
    monkeypatch.setattr(discovery_module, "ASK_S_MAX", 0.1)
    monkeypatch.setattr(discovery_module, "LOOK_S", 0.01)


class Swarm:
    """What a running discovery found, and what it asks."""

    def __init__(self, *sources: Asked | Heard) -> None:
        self.found: list[str] = []
        self.lonely = True
        self.discovery = Discovery(sources, self.found.extend, lambda: self.lonely, random.Random(1))

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.discovery.status(0.0) if row["source"] == name)

    async def until(self, condition: Callable[[], Any], seconds: float = 5.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - a discovery tells of itself when asked
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(*sources: Asked | Heard) -> AsyncIterator[Swarm]:
    swarm = Swarm(*sources)
    task = asyncio.create_task(swarm.discovery.run())
    try:
        yield swarm
        assert not task.done(), "discovery goes on for ever"
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=2)
        assert task.cancelled()


def given(*addresses: str) -> Asked:
    return Asked("given", Given(addresses))


async def test_a_source_that_fails_is_asked_again_with_growing_pauses_and_used_again_once_it_works() -> None:
    times: list[float] = []
    works = False

    async def moody() -> Sequence[str]:
        times.append(asyncio.get_running_loop().time())
        if not works:
            raise OSError("the network is down")
        return [B]

    async with running(Asked("moody", moody), given(A)) as swarm:
        await swarm.until(lambda: len(times) >= 6)
        assert A in swarm.found, "the others go on"
        assert swarm.row("moody")["error"] == "OSError: the network is down"
        assert swarm.row("moody")["last_success_s"] is None
        assert swarm.row("given")["error"] is None
        pauses = [late - early for early, late in pairwise(times)]
        assert pauses[3] > 2 * pauses[0], "the pause grows"
        works = True
        await swarm.until(lambda: B in swarm.found)
        assert swarm.row("moody")["error"] is None
        assert swarm.row("moody")["found"] == 1
        asked, works = len(times), False
        await swarm.until(lambda: len(times) >= asked + 3)
        pauses = [late - early for early, late in pairwise(times[asked:])]
        assert pauses[0] < 0.06, "a success resets the pause"


async def test_who_has_peers_asks_nobody_and_who_loses_them_asks_at_once() -> None:
    async with running(given(A)) as swarm:
        await swarm.until(lambda: swarm.found)
        swarm.lonely = False
        await asyncio.sleep(0.05)
        swarm.found.clear()
        await asyncio.sleep(0.1)
        assert not swarm.found
        swarm.lonely = True
        await swarm.until(lambda: swarm.found == [A], 0.5)


async def test_a_source_that_must_be_asked_anyway_is() -> None:
    asked: list[int] = []

    async def announcing() -> Sequence[str]:
        asked.append(1)
        return ()

    async with running(Asked("announcing", announcing, always=True)) as swarm:
        swarm.lonely = False
        await swarm.until(lambda: len(asked) > 2)


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_source_that_hangs_is_given_up_after_its_deadline(stubborn: bool) -> None:
    calls: list[int] = []
    let_go = asyncio.Event()

    async def hang() -> Sequence[str]:
        calls.append(1)
        while True:
            try:
                await let_go.wait()
                return [B]
            except asyncio.CancelledError:
                if not stubborn:
                    raise

    async with running(Asked("hang", hang), given(A)) as swarm:
        await swarm.until(lambda: swarm.row("hang")["error"])
        assert swarm.row("hang")["error"] == "no answer within 0.1 s"
        assert A in swarm.found
        if stubborn:
            await asyncio.sleep(0.3)
            assert len(calls) == 1, "one that can't even be cancelled isn't started twice"
            let_go.set()
        else:
            await swarm.until(lambda: len(calls) > 1)
            let_go.set()
        await swarm.until(lambda: B in swarm.found)


def endless() -> Iterator[str]:
    while True:
        yield "junk"


class Nasty:
    """Answers with something worse each time."""

    answers: tuple[Any, ...] = (
        None, 7, "not a list", b"bytes", [None, 7, b"x"], [A + "\n"], ["/ip4/1.2.3.4/tcp/1"], ["x" * 10_000_000], {"a": 1},
        endless(), [f"/ip4/192.0.2.7/tcp/1/p2p/{'1' * 52}"], [["nested"]],
    )  # fmt: skip

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> Any:
        self.count += 1
        return self.answers[self.count % len(self.answers)]


async def test_junk_never_reaches_the_core_and_is_said() -> None:
    nasty = Nasty()
    async with running(Asked("nasty", nasty), given(A)) as swarm:
        await swarm.until(lambda: nasty.count > 2 * len(nasty.answers), 20)
        assert set(swarm.found) == {A}
        assert swarm.row("nasty")["error"]
        assert swarm.row("nasty")["found"] == 0


async def test_a_source_that_cancels_or_ends_itself_takes_nobody_along() -> None:
    async def suicidal() -> Sequence[str]:
        raise asyncio.CancelledError

    async def listens_and_ends(hear: Hear) -> None:
        hear([B])

    async def listens_and_fails(hear: Hear) -> None:
        raise PermissionError("no multicast here")

    async def listens_and_cancels(hear: Hear) -> None:
        raise asyncio.CancelledError

    heard = (Heard("ends", listens_and_ends), Heard("fails", listens_and_fails), Heard("cancels", listens_and_cancels))
    async with running(Asked("suicidal", suicidal), *heard, given(A)) as swarm:
        await swarm.until(lambda: {A, B} <= set(swarm.found))
        await swarm.until(lambda: all(swarm.row(name)["error"] for name in ("suicidal", "ends", "fails", "cancels")))
        assert swarm.row("fails")["error"] == "PermissionError: no multicast here"
        assert swarm.row("fails")["next_try_s"] is not None
        assert swarm.row("ends")["last_success_s"] is not None


async def test_what_is_heard_is_told_at_once_and_again_when_peers_are_missing() -> None:
    async def listen(hear: Hear) -> None:
        hear(())  # it works, and nobody is there yet
        await speak.wait()
        hear([B])
        await asyncio.Event().wait()

    speak = asyncio.Event()
    async with running(Heard("radio", listen)) as swarm:
        await swarm.until(lambda: swarm.row("radio")["last_success_s"] is not None)
        assert swarm.row("radio")["found"] == 0
        swarm.lonely = False
        await asyncio.sleep(0.05)
        speak.set()
        await swarm.until(lambda: swarm.found == [B])
        await asyncio.sleep(0.1)
        assert swarm.found == [B], "once is enough for who has peers"
        swarm.lonely = True
        await swarm.until(lambda: len(swarm.found) > 1)
        assert set(swarm.found) == {B}


async def test_what_is_heard_is_bounded_in_size_and_in_pace() -> None:
    async def shout(hear: Hear) -> None:
        for number in range(100):
            hear([address(1000 * number + n) for n in range(200)])
        await asyncio.Event().wait()

    async with running(Heard("shouter", shout), given(A)) as swarm:
        await swarm.until(lambda: A in swarm.found)
        await asyncio.sleep(0.05)
        assert swarm.row("shouter")["found"] <= HEARD_MAX
        assert HEARD_MAX <= len(set(swarm.found)) <= 2 * HEARD_MAX + 20, "new names are told at a pace, not all at once"


async def test_a_listener_that_broke_is_started_again_and_forgets_its_failure() -> None:
    starts: list[int] = []

    async def listen(hear: Hear) -> None:
        starts.append(1)
        if len(starts) < 4:
            raise OSError("the interface is down")
        hear([B])
        await asyncio.Event().wait()

    async with running(Heard("radio", listen)) as swarm:
        await swarm.until(lambda: B in swarm.found)
        row = swarm.row("radio")
        assert (row["error"], row["found"]) == (None, 1)
        assert len(starts) == 4


async def test_a_listener_that_gives_no_sign_of_life_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery_module, "SILENCE_S_MAX", 0.15)
    starts: list[int] = []

    async def listen(hear: Hear) -> None:
        starts.append(1)
        for _ in range(5):
            await asyncio.sleep(0.05)
            hear(())
        await asyncio.Event().wait()

    async with running(Heard("radio", listen), given(A)) as swarm:
        await swarm.until(lambda: swarm.row("radio")["error"])
        assert swarm.row("radio")["error"] == "no sign of life for 0.15 s"
        assert swarm.row("radio")["last_success_s"] is not None
        await swarm.until(lambda: len(starts) > 2)


async def test_a_source_that_can_not_even_be_called_takes_nobody_along() -> None:
    def broken(*nothing: object) -> Any:
        raise RuntimeError("not even a coroutine")

    async with running(Asked("asked", broken), Heard("heard", broken), given(A)) as swarm:
        await swarm.until(lambda: swarm.row("asked")["error"] and swarm.row("heard")["error"] and A in swarm.found)
        assert swarm.row("heard")["error"] == swarm.row("asked")["error"] == "RuntimeError: not even a coroutine"


async def test_addresses_given_are_bounded() -> None:
    kept = Given([A])
    for number in range(GIVEN_MAX):
        kept.add(address(number + 10))
        kept.add(address(number + 10))
    assert len(addresses := await kept()) == GIVEN_MAX
    assert addresses[0] == address(10)


def test_usable_addresses_are_few_short_and_name_a_peer() -> None:
    assert usable([A, A, B]) == (A, B)
    assert len(usable(address(number) for number in range(1000))) == ADDRESSES_MAX
    assert usable([A + "é", " " + A, A[1:], A + "/p2p-circuit", "/p2p/" + A.rpartition("/")[2]]) == ()
    relayed = f"{A}/p2p-circuit/p2p/{B.rpartition('/')[2]}"
    assert usable([relayed]) == (relayed,)


# --- what the core makes of it ------------------------------------------------------------------------------------------


def test_a_fresh_address_of_a_known_peer_is_dialled_too_and_first_once_the_old_one_has_failed() -> None:
    bench = Bench(contacts=[1])
    fresh = core_address(1).replace("/sim/1", "/sim/99")
    bench.do(ev.Join((fresh,)))
    assert Bench.of(fx.Dial, bench.all) == [fx.Dial(core_identity(1).peer, (core_address(1), fresh))]
    bench.do(ev.DialFailed(core_identity(1).peer, (core_address(1), fresh), "no answer"))
    assert Bench.of(fx.Dial, bench.wait(LAPTOP.redial_s_max)) == [fx.Dial(core_identity(1).peer, (fresh, core_address(1)))]


def test_a_flood_of_names_neither_fills_the_table_of_seeds_nor_keeps_new_ones_out() -> None:
    bench = Bench(limits=replace(LAPTOP, contacts_known_max=8, dials_max=1))
    bench.do(ev.Join(tuple(core_address(n) for n in range(1, 40))))
    bench.do(ev.Join((core_address(1), core_address(39))))
    seeds = bench.core._members.contacts.seeds
    assert len(seeds) == 8
    assert list(seeds)[-2:] == [core_identity(1).peer, core_identity(39).peer]
