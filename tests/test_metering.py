"""A day's budget: its arithmetic, what the disk keeps of it, and two transports that are held to it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import metering as metering_module
from p2pnode.config import BUDGET_MIN, Config
from p2pnode.errors import ConfigError
from p2pnode.metering import BULK_SHARE, DAY_S, NOTE, Meter, Metering
from p2pnode.pacing import Flow, Ration
from p2pnode.parts import _warn_if_slow
from p2pnode.records import Records
from p2pnode.transport import NOTHING_LEFT, Transport
from protocols.events import DialFailed, Frame, Metered, PeerDown, PeerUp
from tests.transports import Libp2pWorld, MemoryWorld, Node, World

NOON = 20_000 * DAY_S + DAY_S / 2
CHUNK = bytes(256 * 1024)


class Clock:
    """Seconds since 1970, as the test says."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_day_begins_with_nothing_used_and_ends_at_midnight_utc() -> None:
    meter = Meter.resume(1000, None, NOON)
    assert meter.used(crossed=0) == 0
    assert meter.until == 20_001 * DAY_S
    assert not meter.turn(500, 20_001 * DAY_S - 0.001)
    assert meter.used(crossed=500) == 500
    assert meter.turn(500, 20_001 * DAY_S)
    assert meter.used(crossed=500) == 0
    assert meter.used(crossed=620) == 120


def test_what_was_used_comes_back_after_a_restart_on_the_same_day_only() -> None:
    note = Meter.resume(1000, None, NOON).note(crossed=700)
    assert Meter.resume(1000, note, NOON + 60).used(crossed=50) == 750
    assert Meter.resume(1000, note, NOON + DAY_S).used(crossed=50) == 50


def test_a_clock_set_back_over_midnight_begins_no_day_anew() -> None:
    after = 20_001 * DAY_S + 1.0
    meter = Meter.resume(1000, None, after)
    assert not meter.turn(900, after - 2)
    assert meter.used(900) == 900
    assert Meter.resume(1000, meter.note(900), after - 2).used(0) == 900
    assert meter.turn(900, after - 3 * DAY_S), "but one that was wrong by days is believed"


@given(st.one_of(st.text(), st.dictionaries(st.text(), st.integers()).map(json.dumps), st.just('{"day": 20000, "used": -5}')))
def test_a_note_that_is_none_of_ours_counts_as_nothing(note: str) -> None:
    assert Meter.resume(1000, note, NOON).used(0) == 0


@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=30))
def test_restarts_never_raise_what_a_day_may_use(steps: list[tuple[int, bool]]) -> None:
    """Each step: some bytes cross as far as the ration lets them, then perhaps a clean restart."""
    meter, crossed, used = Meter.resume(1000, None, NOON), 0, 0
    for size, restart in steps:
        size = max(0, min(size, meter.ration.all - crossed))
        crossed, used = crossed + size, used + size
        assert meter.used(crossed) == used
        if restart:
            meter, crossed = Meter.resume(1000, meter.note(crossed), NOON), 0
    assert used <= 1000


def test_models_stop_before_everything_does() -> None:
    meter = Meter.resume(1000, '{"day": 20000, "used": 200}', NOON)
    assert [meter.ration.flow(crossed) for crossed in (0, 749, 750, 799, 800)] == [
        Flow.ALL, Flow.ALL, Flow.CONTROL, Flow.CONTROL, Flow.NOTHING,
    ]  # fmt: skip


@pytest.mark.parametrize(("budget", "said"), [("lots", "no size"), ("9 MB", "10 MB or more"), ("2 Gb", "bits")])
def test_budgets_that_can_t_be(budget: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(budget=budget)


def test_rates_and_budgets_of_a_config() -> None:
    config = Config(max_upload="200 kB", max_download="1.5MB/s", budget="2GiB")
    assert (config.rates.upload, config.rates.download, config.budget_bytes) == (200_000, 1_500_000, 2 << 30)
    assert (Config().rates.upload, Config().rates.download, Config().budget_bytes) == (0, 0, 0)
    slow = Config(max_download="20 kB").bounds
    assert slow.chunk_gap_s_max > Config().bounds.chunk_gap_s_max + 100, "who is slow himself blames nobody for it"
    with pytest.raises(ConfigError, match="max_upload"):
        Config(max_upload="1 kB")


def test_a_transport_that_counts_nothing_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="leave budget out"):
        Transport.ration(None, Ration(1, 1), lambda flow: None)  # type: ignore[arg-type]


def test_a_rate_too_slow_for_the_model_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _warn_if_slow(Config(max_upload="20 kB", max_download="1 MB"), 12_000_000)
    assert [line.partition(":")[0] for line in caplog.messages] == ["a model takes 10 minutes at max_upload 20 kB a second"]


# --- held by a transport --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[MemoryWorld, Libp2pWorld], ids=["memory", "libp2p"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = request.param()
    yield made
    await made.close()


def used_of(metering: Metering) -> int:
    status = metering.status()
    assert status is not None
    used = status["used"]
    assert isinstance(used, int)
    return used


def state_of(metering: Metering) -> str:
    return str((metering.status() or {})["state"])


def flood(one: Node, two: Node) -> None:
    for a, b in ((one, two), (two, one)):
        for _ in range(8):
            a.transport.send(b.peer, CHUNK, bulk=True)


async def until_state(metering: Metering, wanted: str, work: object = None) -> None:
    async with asyncio.timeout(20):
        while state_of(metering) != wanted:
            if callable(work):
                work()
            await asyncio.sleep(0.01)


async def test_a_budget_is_used_up_and_not_more_and_the_next_day_goes_on(world: World, tmp_path: Path) -> None:
    budget, clock, fed = BUDGET_MIN, Clock(), asyncio.Queue[Metered]()
    records = await Records.open(tmp_path / "node")
    one, two = await world.node(1), await world.node(2)
    metering = Metering(budget, records, one.transport, fed.put_nowait, clock)
    await world.link(one, two)
    running = asyncio.create_task(metering.run())
    await until_state(metering, "no models", lambda: flood(one, two))
    assert await fed.get() == Metered(False)
    await one.next(PeerDown)
    assert "nearly used up" in one.all(PeerDown)[0].reason
    await asyncio.sleep(0.3)
    assert BULK_SHARE * budget <= used_of(metering) <= 1.05 * budget

    await world.link(two, one)  # talk goes on, models don't
    before = used_of(metering)
    two.transport.send(one.peer, b"talk")
    one.transport.send(two.peer, CHUNK, bulk=True)
    await one.until(lambda: Frame(two.peer, b"talk") in one.events)
    await asyncio.sleep(0.3)
    assert used_of(metering) - before < len(CHUNK) / 4

    frame = bytes(12 * 1024)

    def chatter() -> None:
        for _ in range(20):
            two.transport.send(one.peer, frame)

    await until_state(metering, "spent", chatter)
    await one.next(PeerDown, 2)
    assert one.all(PeerDown)[1].reason == NOTHING_LEFT
    one.transport.dial(two.peer, two.transport.addresses)
    assert (await one.next(DialFailed)).reason == NOTHING_LEFT
    await two.next(PeerDown, 2)
    two.transport.dial(one.peer, one.transport.addresses)
    await two.next(DialFailed)
    await asyncio.sleep(0.2)
    assert used_of(metering) <= 1.05 * budget
    status = metering.status()
    assert status is not None
    assert (status["limit"], status["until"]) == (budget, "2024-10-05T00:00:00Z")

    running.cancel()
    clock.now = 20_001 * DAY_S - 0.3
    again = asyncio.create_task(metering.run())
    await asyncio.sleep(0)
    clock.now = 20_001 * DAY_S
    await until_state(metering, "free")
    assert used_of(metering) < 0.05 * budget
    await world.link(one, two)
    one.transport.send(two.peer, CHUNK, bulk=True)
    await two.until(lambda: Frame(one.peer, CHUNK) in two.events)
    again.cancel()
    while fed.qsize() > 1:
        fed.get_nowait()
    assert fed.get_nowait() == Metered(True)
    await records.close()


async def test_what_several_peers_have_under_way_fits_into_the_reserve(world: World, tmp_path: Path) -> None:
    records = await Records.open(tmp_path / "node")
    one = await world.node(1)
    metering = Metering(BUDGET_MIN, records, one.transport, lambda event: None, Clock())
    others = [await world.node(number) for number in (2, 3, 4, 5)]
    for other in others:
        await world.link(one, other)

    def crowd() -> None:
        for other in others:
            flood(one, other)

    await until_state(metering, "no models", crowd)
    await asyncio.sleep(0.5)
    assert state_of(metering) == "no models"
    assert BULK_SHARE * BUDGET_MIN <= used_of(metering) < BUDGET_MIN
    await records.close()


async def test_a_node_that_was_spent_stays_so_after_a_restart(world: World, tmp_path: Path) -> None:
    records = await Records.open(tmp_path / "node")
    await records.note(NOTE, json.dumps({"day": 20_000, "used": 2 * BUDGET_MIN}))
    one, two = await world.node(1), await world.node(2)
    fed: asyncio.Queue[Metered] = asyncio.Queue()
    metering = Metering(BUDGET_MIN, records, one.transport, fed.put_nowait, Clock())
    await until_state(metering, "spent")
    two.transport.dial(one.peer, one.transport.addresses)
    await two.next(DialFailed)
    assert one.all(PeerUp) == []
    running = asyncio.create_task(metering.run())
    await asyncio.sleep(0.05)
    assert fed.qsize() >= 1
    running.cancel()
    await records.close()


async def test_the_count_is_on_the_disk_within_seconds(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering_module, "SAVE_S", 0.05)
    records = await Records.open(tmp_path / "node")
    one, two = await world.pair()
    metering = Metering(10 * BUDGET_MIN, records, one.transport, lambda event: None, Clock())
    running = asyncio.create_task(metering.run())
    for _ in range(4):
        one.transport.send(two.peer, CHUNK, bulk=True)
    await two.next(Frame, 4)
    kept = {"used": 0}
    async with asyncio.timeout(5):
        while kept["used"] < 4 * len(CHUNK):
            await asyncio.sleep(0.02)
            kept = json.loads(await records._do(lambda: records.store.note(NOTE)) or '{"used": 0}')
    assert kept["day"] == 20_000
    running.cancel()  # as a crash would end it: nothing is saved at the end
    await records.close()
    again = await Records.open(tmp_path / "node")
    assert Meter.resume(10 * BUDGET_MIN, again.store.note(NOTE), NOON).used(0) >= kept["used"]
    await again.close()
