"""The way between asyncio and trio: start, calls, cancellation, exceptions and stop, in both directions."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from p2pnode.libp2p_bridge import BridgeClosed, Mailbox, TrioThread


@pytest.fixture
async def bridge() -> AsyncIterator[TrioThread]:
    thread = TrioThread("test-trio")
    await thread.start()
    yield thread
    await thread.stop(5)


def alive(name: str) -> bool:
    return name in {thread.name for thread in threading.enumerate()}


async def test_a_call_runs_in_the_trio_thread_and_returns(bridge: TrioThread) -> None:
    async def add(one: int, two: int) -> tuple[int, str]:
        await trio.lowlevel.checkpoint()
        return one + two, threading.current_thread().name

    assert await bridge.call(add, 2, 3) == (5, "test-trio")
    assert await asyncio.gather(*(bridge.call(add, n, 0) for n in range(100))) == [(n, "test-trio") for n in range(100)]


async def test_an_exception_crosses_and_the_thread_lives_on(bridge: TrioThread) -> None:
    async def fail() -> None:
        raise KeyError("over there")

    async def fine() -> str:
        return "fine"

    with pytest.raises(KeyError, match="over there"):
        await bridge.call(fail)
    assert await bridge.call(fine) == "fine"


async def test_cancelling_a_call_waits_until_trio_has_unwound(bridge: TrioThread) -> None:
    steps: list[str] = []
    running = threading.Event()

    async def linger() -> None:
        try:
            running.set()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            steps.append("unwound")

    task = asyncio.create_task(bridge.call(linger))
    await asyncio.to_thread(running.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["unwound"]


async def test_cancelling_twice_and_timing_out_still_wait(bridge: TrioThread) -> None:
    steps: list[str] = []

    async def linger() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
            steps.append("unwound")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await bridge.call(linger)
    assert steps == ["unwound"]
    task = asyncio.create_task(bridge.call(linger))
    for _ in range(3):
        await asyncio.sleep(0.02)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["unwound", "unwound"]


async def test_a_call_cancelled_from_the_trio_side_is_cancelled_here(bridge: TrioThread) -> None:
    async def give_up() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await trio.sleep_forever()

    await bridge.call(give_up)  # its own scope: no business of the caller's

    async def cancel_all() -> None:
        assert bridge._nursery is not None
        bridge._nursery.cancel_scope.cancel()
        await trio.sleep_forever()

    with pytest.raises(BridgeClosed):
        await bridge.call(cancel_all)


async def test_stop_ends_pending_calls_and_the_thread() -> None:
    thread = TrioThread("short-lived")
    await thread.start()
    calls = [asyncio.create_task(thread.call(trio.sleep_forever)) for _ in range(3)]
    await asyncio.sleep(0.02)
    began = time.monotonic()
    await thread.stop(5)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [BridgeClosed] * 3
    assert time.monotonic() - began < 1
    assert not alive("short-lived")
    await thread.stop(5)
    with pytest.raises(BridgeClosed):
        await thread.call(trio.sleep, 0)
    with pytest.raises(BridgeClosed):
        thread.post(print)


async def test_stop_that_trio_ignores_is_a_timeout() -> None:
    thread = TrioThread("stubborn")
    await thread.start()
    release = threading.Event()
    thread.post(release.wait)  # a call that blocks the whole thread
    with pytest.raises(TimeoutError):
        await thread.stop(0.1)
    release.set()
    await thread.stop(5)


async def test_what_a_post_raises_is_logged_and_kills_nothing(bridge: TrioThread, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("in a post")

    bridge.post(fail)
    await bridge.call(trio.sleep, 0)
    assert "a call in the trio thread test-trio failed" in caplog.text


def test_a_thread_outlives_its_loop_and_is_stopped_from_another() -> None:
    thread = TrioThread("orphan")
    done = threading.Event()

    async def slow() -> None:
        await trio.sleep(0.05)
        done.set()

    async def main() -> None:
        await thread.start()
        thread.post(lambda: thread._nursery and thread._nursery.start_soon(slow))
        pending = asyncio.ensure_future(thread.call(trio.sleep_forever))
        await asyncio.sleep(0.01)
        pending.cancel()

    asyncio.run(main())
    assert done.wait(5)
    asyncio.run(thread.stop(5))
    assert not alive("orphan")


async def test_messages_to_trio_and_back_keep_their_order_and_wake_once_a_burst(bridge: TrioThread) -> None:
    loop = asyncio.get_running_loop()
    got: list[int] = []
    wakes = [0, 0]
    full = asyncio.Event()

    def to_loop(drain: Callable[[], None]) -> None:
        wakes[1] += 1
        loop.call_soon_threadsafe(drain)

    def to_trio(drain: Callable[[], None]) -> None:
        wakes[0] += 1
        bridge.post(drain)

    def take(number: int) -> None:
        got.append(number)
        if len(got) == 5000:
            full.set()

    back: Mailbox[int] = Mailbox(to_loop, take)
    out: Mailbox[int] = Mailbox(to_trio, back.post)
    for number in range(5000):
        out.post(number)
    async with asyncio.timeout(10):
        await full.wait()
    assert got == list(range(5000))
    assert wakes[0] < 500
    assert wakes[1] < 500


async def test_a_message_that_fails_is_logged_and_the_next_is_handled(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    got: list[float] = []
    box: Mailbox[int] = Mailbox(loop.call_soon_threadsafe, lambda number: got.append(1 / number))
    with caplog.at_level(logging.ERROR):
        for number in (1, 0, 2):
            box.post(number)
        await asyncio.sleep(0.02)
    assert got == [1.0, 0.5]
    assert "ZeroDivisionError" in caplog.text


async def test_posting_to_one_who_has_gone_is_nothing() -> None:
    thread = TrioThread("gone")
    await thread.start()
    await thread.stop(5)
    box: Mailbox[int] = Mailbox(thread.post, print)
    box.post(1)
    loop = asyncio.new_event_loop()
    loop.close()
    closed: Mailbox[int] = Mailbox(loop.call_soon_threadsafe, print)
    closed.post(1)
    assert not closed._messages


async def test_two_bridges_live_side_by_side(bridge: TrioThread) -> None:
    other = TrioThread("second-trio")
    await other.start()

    async def name() -> str:
        return threading.current_thread().name

    assert await asyncio.gather(bridge.call(name), other.call(name)) == ["test-trio", "second-trio"]
    await other.stop(5)
    assert await bridge.call(name) == "test-trio"
