"""Bad input against a whole core: every malformed frame in every state of a link, and a flood that knows the protocol."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from protocols import effects as fx
from protocols import events as ev
from protocols.core import Core, Phase, swarm_digest
from protocols.identity import SIGNATURE_BYTES
from protocols.limits import EDGE, LAPTOP, Limits
from protocols.links import State
from protocols.merkle import Digest
from protocols.messages import (
    Bye,
    Chunk,
    Contact,
    ForwardJoin,
    Gone,
    Goodbye,
    Have,
    Hello,
    Message,
    Neighbour,
    NeighbourReply,
    Ping,
    Pong,
    Revocations,
    RevocationsKnown,
    Shuffle,
    SignedOffer,
    Want,
)
from protocols.scoring import Scores
from protocols.settings import ScalarSettings
from protocols.wire import Type, decode, encode, sign_revocation
from tests import corpus
from tests.core_harness import SCHEMA, SIZE, SWARM, Bench, contact, digest_of, identity, offer_of
from tests.core_tables import check_tables
from tests.test_wire import GENERATED, GENERATED_SEED

GREETING, OPEN, ACTIVE, CLOSING, UNKNOWN = range(1, 6)
KINDS = (fx.Dial, fx.Hangup, fx.Send, fx.SendBlob, fx.WriteChunk, fx.Discard, fx.Train, fx.Merge, fx.Store, fx.Report, fx.Revoked,
         fx.Apply, fx.Probe, fx.Fingerprint, fx.Log, fx.Compact, fx.Trim, fx.Adopt)  # fmt: skip


def state(core: Core, number: int) -> State | None:
    link = core._links.get(identity(number).peer)
    return link.state if link else None


def restore(bench: Bench) -> None:
    """Everybody in his state again, whatever the last frame did; guilt is forgotten."""
    bench.core._scores = Scores(bench.limits)
    if state(bench.core, GREETING) is not State.GREETING:
        bench.down(GREETING)
        bench.up(GREETING)
    if state(bench.core, OPEN) is not State.OPEN:
        bench.down(OPEN)
        bench.open(OPEN)
    if identity(ACTIVE).peer not in bench.core._members.active:
        bench.down(ACTIVE)
        bench.befriend(ACTIVE)
    if state(bench.core, CLOSING) is not State.CLOSING:
        bench.down(CLOSING)
        bench.open(CLOSING)
        bench.say(CLOSING, Bye(Goodbye.IDLE, ""))


def feed(frames: Iterable[bytes], *, refused: bool, **options: Any) -> int:
    """Send every frame on a link of every state. Returns how many were blamed on the sender."""
    bench, blamed = Bench(**options), 0
    bench.tick()
    for data in frames:
        bench.tick(0.02)
        restore(bench)
        assert not bench.raw(CLOSING, data), "a closing link isn't listened to"
        assert not bench.raw(UNKNOWN, data), "nor is somebody without a link"
        for number in (GREETING, OPEN, ACTIVE):
            before = bench.score(number)
            effects = bench.raw(number, data)
            assert all(isinstance(effect, KINDS) for effect in effects)
            said = {effect.kind for effect in effects if isinstance(effect, fx.Report)}
            fault = bench.score(number) > before or fx.Kind.REFUSED in said  # a hello of another version is refused
            blamed += fault
            assert fault or not refused, data[:40].hex()
            if refused:
                assert {type(effect) for effect in effects} <= {fx.Report, fx.Send, fx.Hangup, fx.Dial, fx.Probe}
        bench.all.clear()
    check_tables(bench.core)
    return blamed


@pytest.mark.parametrize("scalars", [None, ScalarSettings("log")], ids=["models", "scalars"])
def test_hand_made_frames_are_blamed_in_every_state(scalars: ScalarSettings | None) -> None:
    frames = corpus.malformed().values()
    assert feed(frames, refused=True, scalars=scalars) == 3 * len(frames)


@pytest.mark.parametrize("scalars", [None, ScalarSettings("log")], ids=["models", "scalars"])
def test_generated_frames_bring_nothing_but_effects(scalars: ScalarSettings | None) -> None:
    frames = [*corpus.hostile().values(), *corpus.mutations(GENERATED // 2, GENERATED_SEED)]
    assert feed(frames, refused=False, scalars=scalars) > len(frames)


# --- a flood that knows the protocol ---------------------------------------------------------------------------------------


class Flood:
    """Peers who say whatever is well formed, and some of what isn't."""

    def __init__(self, seed: int, peers: int) -> None:
        self.draw = random.Random(seed)
        self.peers = range(1, peers + 1)
        self.authors = 0
        self.offers = [offer_of(number, 1) for number in self.peers]

    def stranger(self) -> Contact:
        peer = identity(10_000 + self.draw.randrange(300)).peer
        return Contact(peer, (f"/ip4/1.2.3.4/tcp/{self.draw.randrange(65536)}",) * self.draw.randrange(4))

    def offer(self, number: int) -> SignedOffer:
        match self.draw.randrange(8):
            case 0:
                self.authors += 1
                return offer_of(20_000 + self.authors, self.draw.randrange(5), "same")
            case 1:
                return offer_of(number, 0, size=SIZE + 1)
            case 2:
                good = self.draw.choice(self.offers)
                return SignedOffer(good.offer, good.body, bytes(SIGNATURE_BYTES), True)
            case 3 | 4:
                return self.draw.choice(self.offers)
            case _:
                made = offer_of(number, self.draw.randrange(50), age=self.draw.randrange(1 << 48), pull=True)
                self.offers[self.draw.randrange(len(self.offers))] = made
                return made

    def message(self, number: int) -> Message:
        draw = self.draw
        digest = draw.choice(self.offers).offer.digest if draw.random() < 0.8 else Digest(draw.randbytes(32))
        match draw.randrange(16):
            case 0 if draw.random() < 0.2:
                return Hello(bytes(16), SCHEMA, ())
            case 1 if draw.random() < 0.2:
                return Bye(draw.choice(list(Goodbye)), "flood")
            case 2:
                return ForwardJoin(self.stranger(), draw.randrange(17))
            case 3:
                return Neighbour(draw.random() < 0.3, draw.random() < 0.3)
            case 4:
                return NeighbourReply(draw.random() < 0.5)
            case 5:
                return Shuffle(tuple(self.stranger() for _ in range(draw.randrange(9))), draw.random() < 0.5)
            case 6:
                return draw.choice((Ping, Pong))(draw.getrandbits(32))
            case 7 | 8:
                return Want(draw.choice((digest, digest_of("own"))), draw.randrange(3), draw.randrange(3))
            case 9:
                return draw.choice((Gone, Have))(digest)
            case 14 if draw.random() < 0.3:
                return RevocationsKnown(draw.randbytes(16))
            case 15 if draw.random() < 0.3:
                victims = (identity(30_000 + draw.randrange(500)).peer for _ in range(draw.randrange(1, 9)))
                return Revocations(tuple(sign_revocation(identity(number), swarm_digest(SWARM), v, b"flood") for v in victims))
            case 10:
                return Chunk(digest, draw.randrange(3), bytes(32 * draw.randrange(3)), draw.randbytes(draw.choice((0, 5, SIZE))))
            case _:
                return self.offer(number)

    def frame(self, number: int) -> bytes:
        data = encode(self.message(number))
        return data[: self.draw.randrange(len(data))] if self.draw.random() < 0.02 else data


def answer(bench: Bench, effects: list[fx.Effect], draw: random.Random) -> None:
    """What a driver does, with delays left out: the disk and the trainer answer, links that are hung up go down."""
    for effect in list(effects):
        match effect:
            case fx.Dial(peer, addresses):
                bench.do(ev.DialFailed(peer, addresses, "no"))
            case fx.Hangup(peer, reason) if draw.random() < 0.7:
                answer(bench, bench.do(ev.PeerDown(peer, reason)), draw)
            case fx.Send(peer, data) if data[1] == Type.WANT and draw.random() < 0.5:
                want, number = decode(data, bench.limits), next(n for n in range(1, 41) if identity(n).peer == peer)
                names = [name for name in (*((number, s) for s in range(50)), "same") if digest_of(name) == want.digest]
                for name in names:
                    answer(bench, bench.chunk(number, name), draw)
            case fx.Merge(_, inputs):
                faults = tuple((one.digest, "not finite") for one in inputs if draw.random() < 0.2)
                used = tuple(one.digest for one in inputs)
                answer(bench, bench.do(ev.Merged(digest_of("own"), SIZE, draw.random() < 0.5, used, faults)), draw)
            case fx.Store():
                answer(bench, bench.store(), draw)


@pytest.mark.parametrize(("limits", "peers"), [(LAPTOP, 40), (EDGE, 8)])
def test_every_table_stays_within_its_limit_under_a_flood(limits: Limits, peers: int) -> None:
    bench, flood = Bench(limits=replace(limits, penalty_half_life_s=2.0)), Flood(1, peers)
    draw = flood.draw
    bench.tick()
    heard = faults = 0
    merged: Counter[Digest] = Counter()
    for _ in range(20_000):
        number = draw.choice(flood.peers)
        if state(bench.core, number) is not State.OPEN or draw.random() < 0.005:
            bench.down(number)
            bench.up(number, dialled=draw.random() < 0.1)
            bench.hello(number)
        heard += state(bench.core, number) is State.OPEN
        effects = bench.raw(number, flood.frame(number), after=draw.choice((0.0, 0.001, 0.2)))
        answer(bench, effects, draw)
        if draw.random() < 0.002:
            answer(bench, bench.do(ev.Metered(draw.random() < 0.8)), draw)
        if draw.random() < 0.02 and bench.core.snapshot(bench.now).phase is Phase.TRAINING:
            answer(bench, bench.train("own"), draw)
        if draw.random() < 0.1:
            answer(bench, bench.tick(max(0.0, bench.core.deadline - bench.now)), draw)
            assert bench.core.deadline > bench.now
        faults += sum(1 for r in Bench.of(fx.Report, effects) if r.kind is fx.Kind.PEER_FAULT)
        merged.update(one.digest for merge in Bench.of(fx.Merge, bench.all) for one in merge.inputs)
        bench.all.clear()
        check_tables(bench.core)
    assert heard > 5_000
    assert faults > 1000
    del merged[digest_of("same")]  # of many authors
    assert len(merged) > 10
    assert set(merged.values()) == {1}, "S2: every other model is of one author and one sequence number"


def test_contacts_of_hello_are_as_bounded_as_any() -> None:
    bench = Bench()
    bench.up(1)
    bench.say(1, Hello(bytes(16), SCHEMA, tuple(contact(n).addresses[0] for n in range(5))))
    assert bench.core.snapshot(0).faults == {"hello with 5 addresses": 1}
