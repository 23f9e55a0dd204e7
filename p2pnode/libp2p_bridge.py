"""One thread that runs trio, and the ways between it and an asyncio loop.

Owns the thread, the hand-over of calls and messages in both directions, and what happens to them when either side stops. Must
never know what it carries; nothing but `libp2p_*.py` may import trio.

Everything crosses once per message, not per chunk, and a burst of messages wakes the other side once. A thread of its own and
not trio's guest mode: guest mode moves 163 MB/s where this moves 402 (epoll in guest mode costs a thread hop per I/O wait).

Idea: anyio's blocking portal, with cancellation that waits for the trio side to unwind.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

START_S_MAX = 10.0  # trio needs milliseconds; a machine that is this late is broken

log = logging.getLogger(__name__)


class BridgeClosed(RuntimeError):
    """The trio thread has stopped, or stopped before the call was done."""


class Mailbox(Generic[T]):
    """Messages from one thread to another, in order; a burst wakes the reader once.

    `wake(drain)` must have `drain` called soon in the reader's thread. One thread posts, one thread reads. What `handle` raises
    is logged, and the next message is handled.
    """

    __slots__ = ("_handle", "_messages", "_scheduled", "_wake")

    def __init__(self, wake: Callable[[Callable[[], None]], None], handle: Callable[[T], None]) -> None:
        self._wake = wake
        self._handle = handle
        self._messages: deque[T] = deque()
        self._scheduled = False

    def post(self, message: T) -> None:
        """Queue a message. Never waits, never raises: a reader that has gone for ever is the end of its messages."""
        self._messages.append(message)
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        try:
            self._wake(self._drain)
        except RuntimeError:  # the loop is closed, or trio has finished (BridgeClosed)
            self._messages.clear()

    def _drain(self) -> None:
        # The flag falls before the queue is emptied: a message posted meanwhile is seen here or wakes us again, never neither.
        self._scheduled = False
        for _ in range(len(self._messages)):
            try:
                self._handle(self._messages.popleft())
            except Exception:
                log.exception("a message across the bridge was not handled")
        if self._messages and not self._scheduled:
            self._schedule()  # what came meanwhile waits its turn, so that a flood starves nobody


class TrioThread:
    """`trio.run` in a daemon thread. All methods belong to the asyncio side; `post` to any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stop: trio.Event | None = None
        self._thread: threading.Thread | None = None
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._done: concurrent.futures.Future[None] = concurrent.futures.Future()

    async def start(self) -> None:
        """Start the thread and wait until trio runs in it."""
        assert self._thread is None, "a trio thread starts once"
        for future in (self._ready, self._done):
            future.set_running_or_notify_cancel()  # so that a cancelled waiter on the asyncio side can't cancel it
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        await asyncio.wait_for(asyncio.wrap_future(self._ready), START_S_MAX)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            log.exception("the trio thread %s failed", self._name)
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._done.set_result(None)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with trio.open_nursery() as self._nursery:
            self._ready.set_result(None)
            await self._stop.wait()
            self._nursery.cancel_scope.cancel()

    def post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Have `function(*args)` called in the trio thread. What it raises is logged. Raises BridgeClosed after the end."""

        def guarded() -> None:
            try:
                function(*args)
            except Exception:
                log.exception("a call in the trio thread %s failed", self._name)

        if self._token is None:
            raise BridgeClosed("the trio thread has not started")
        try:
            self._token.run_sync_soon(guarded)
        except trio.RunFinishedError:
            raise BridgeClosed("the trio thread has stopped") from None

    async def call(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Run an async trio function in the trio thread and return what it returns, or raise what it raises.

        When the awaiting task is cancelled, the trio task is cancelled and has unwound before the await ends. Raises BridgeClosed
        when the thread stops first.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        scope = trio.CancelScope()

        def settle(set_answer: Callable[[], None]) -> None:
            def set_once() -> None:
                if not answer.done():
                    set_answer()

            try:
                loop.call_soon_threadsafe(set_once)
            except RuntimeError:
                log.debug("the asyncio loop was closed before a call's answer came")

        async def run() -> None:
            try:
                with scope:
                    value = await function(*args)
                    settle(lambda: answer.set_result(value))
                    return
                settle(lambda: answer.cancel() and None)
            except Exception as failure:
                error = failure
                settle(lambda: answer.set_exception(error))
            except BaseException:  # trio.Cancelled: the thread is stopping
                settle(lambda: answer.set_exception(BridgeClosed("the trio thread has stopped")))
                raise

        def spawn() -> None:
            assert self._nursery is not None
            try:
                self._nursery.start_soon(run)
            except RuntimeError:  # the nursery is closed
                settle(lambda: answer.set_exception(BridgeClosed("the trio thread has stopped")))

        self.post(spawn)
        return await self._unwind(answer, scope)

    async def _unwind(self, answer: asyncio.Future[T], scope: trio.CancelScope) -> T:
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if not answer.done():
                self._cancel(scope)
                while not answer.done():
                    try:
                        await asyncio.wait([answer])
                    except asyncio.CancelledError:
                        continue  # asked again; the trio side is already unwinding
            if not answer.cancelled():
                answer.exception()  # seen, and outranked by our own cancellation
            raise

    def _cancel(self, scope: trio.CancelScope) -> None:
        try:
            self.post(scope.cancel)
        except BridgeClosed:
            log.debug("the trio thread stopped before a call was cancelled")

    async def stop(self, seconds: float) -> None:
        """Cancel what runs in the thread and wait for its end. May be called twice. Raises TimeoutError after `seconds`."""
        if self._thread is None:
            return
        assert self._stop is not None
        try:
            self.post(self._stop.set)
        except BridgeClosed:
            log.debug("the trio thread has stopped before")
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._done)), seconds)
        self._thread.join(seconds)
