"""Models on their way out: reads pieces of our blobs and hands them to the transport no faster than it takes them.

Owns what was asked for and isn't queued yet, bounded per peer; what doesn't fit is dropped, and the peer asks again. Never
waits for a peer, and never makes a frame that has no place to go.

Peers give up on a chunk that takes too long, and blame us. So where uploads are slow only a few are served at a time, each until
it has asked for nothing for a while; the others are told that the model is gone, and ask somebody else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from p2pnode.blobs import Blobs
from p2pnode.transport import Transport
from protocols.effects import SendBlob
from protocols.identity import PeerId
from protocols.merkle import CHUNK_BYTES
from protocols.messages import Gone
from protocols.wire import encode

WAITING_MAX = 16  # wants of one peer: it asks for half a window at a time, of three models at most
CHUNK_S = 30.0  # for a chunk to arrive: half of what peers wait for one (`chunk_gap_s_max`)
SEAT_S = 15.0  # a peer that is served asks for the next chunks before the last ones have arrived


class Uploads:
    """What peers asked for, in the order they asked. `rate`: most bytes a second that are sent; 0: no limit."""

    def __init__(self, blobs: Blobs, transport: Transport, rate: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._blobs, self._transport = blobs, transport
        self._rate, self._clock = rate, clock
        self._seats: dict[PeerId, float] = {}  # when each was served last
        self._waiting: dict[PeerId, deque[SendBlob]] = {}
        self.dropped = 0  # wants that came while too many others waited
        transport.when_room(self._room)

    def add(self, effect: SendBlob) -> None:
        """Send what fits now; the rest waits until the transport has room."""
        if self._rate and not self._seated(effect):
            self._transport.send(effect.peer, encode(Gone(effect.digest)))
            return
        queue = self._waiting.setdefault(effect.peer, deque())
        if len(queue) >= WAITING_MAX:
            self.dropped += 1
            return
        queue.append(effect)
        if len(queue) == 1:
            self._serve(effect.peer)

    def _seated(self, effect: SendBlob) -> bool:
        now = self._clock()
        for peer, served in list(self._seats.items()):
            if peer not in self._waiting and now - served > SEAT_S:
                del self._seats[peer]
        piece = max(1, min(CHUNK_BYTES, self._blobs.size(effect.digest)))
        if effect.peer not in self._seats and len(self._seats) >= max(1, int(self._rate * CHUNK_S / piece)):
            return False
        self._seats[effect.peer] = now
        return True

    def _room(self, peer: PeerId) -> None:
        if peer in self._waiting:
            self._serve(peer)

    @property
    def waiting(self) -> bool:
        """Whether something waits for room."""
        return bool(self._waiting)

    def forget(self, peer: PeerId) -> None:
        """The link to `peer` is closing or gone."""
        self._waiting.pop(peer, None)
        self._seats.pop(peer, None)

    def _serve(self, peer: PeerId) -> None:
        queue = self._waiting[peer]
        while queue:
            rest = self._send(queue[0])
            if rest is not None:
                queue[0] = rest
                return
            queue.popleft()
        del self._waiting[peer]
        if self._rate:
            self._seats[peer] = self._clock()

    def _send(self, effect: SendBlob) -> SendBlob | None:
        """Queue chunks until the transport refuses one; what is left then."""
        sent = 0
        with self._blobs.frames(effect.digest, effect.first, effect.count) as frames:
            if frames is None:
                self._transport.send(effect.peer, encode(Gone(effect.digest)))
                return None
            for frame in frames:
                if not self._transport.send(effect.peer, frame, bulk=True):
                    return replace(effect, first=effect.first + sent, count=effect.count - sent)
                sent += 1
        return None
