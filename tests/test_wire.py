"""Bytes ⇄ messages: golden frames, malformed ones by the thousand, what decoding costs, and round trips by property."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import messages as m
from protocols.entries import Proof, Row, Run
from protocols.errors import RemoteError
from protocols.fields import UINT_MAX
from protocols.identity import Identity, PeerId
from protocols.limits import LAPTOP
from protocols.merkle import CHUNK_BYTES, Digest
from protocols.wire import (
    CHUNK_FRAME_BYTES_MAX,
    HOPS_MAX,
    INDEX_MAX,
    Type,
    check_offer,
    check_revocation,
    decode,
    encode,
    sign_offer,
)
from tests import corpus, golden
from tests.tidy import ROOT

GENERATED = 20_000
GENERATED_SEED = 2


def lines() -> dict[str, bytes]:
    parts = (line.split("\t") for line in golden.FILE.read_text("utf-8").splitlines())
    return {name: bytes.fromhex(text) for name, text in parts}


def outcome(data: bytes) -> m.Message | RemoteError:
    """What comes of a frame; whatever else is raised fails the test."""
    try:
        return decode(data, LAPTOP)
    except RemoteError as error:
        return error


# --- golden ----------------------------------------------------------------------------------------------------------------


def test_golden_frames_both_ways() -> None:
    written, made = lines(), golden.frames()
    assert len(written) >= 60
    assert list(written) == list(made), "python -m tests.golden writes new ones"
    assert {data[1] for data in written.values()} == set(Type)
    assert [name for name in made if encode(made[name]) != written[name]] == []
    assert [name for name in made if decode(written[name], LAPTOP) != made[name]] == []


def test_golden_offers_are_signed() -> None:
    offers = [message for message in map(outcome, lines().values()) if isinstance(message, m.SignedOffer)]
    brought = [message.signed for message in map(outcome, lines().values()) if isinstance(message, m.Brought)]
    assert (len(offers), len(brought)) == (len(golden.UINTS), 2)
    offers += brought
    for offer in offers:
        check_offer(offer, golden.SCOPE)
        with pytest.raises(RemoteError, match="signature"):
            check_offer(offer, b"\x01" * 32)


def test_golden_revocations_are_signed_by_their_makers_for_one_swarm() -> None:
    found = [message for message in map(outcome, lines().values()) if isinstance(message, m.Revocations)]
    statements = {one for message in found for one in message.statements}
    assert len(statements) == 3
    for one in statements:
        check_revocation(one, golden.SCOPE[:16])
        assert repr(one.secret)[2:-1] not in repr(one) or not one.secret
        for wrong in (replace(one, victim=one.by), replace(one, by=one.victim), replace(one, secret=one.secret + b"x")):
            with pytest.raises(RemoteError, match="signature"):
                check_revocation(wrong, golden.SCOPE[:16])
        with pytest.raises(RemoteError, match="signature"):
            check_revocation(one, b"\x01" * 16)


def test_the_largest_honest_frames_fit() -> None:
    assert len(lines()["shuffle largest"]) < LAPTOP.frame_bytes_max
    chunk = m.Chunk(golden.DIGEST, 5, bytes(32 * 32), bytes(CHUNK_BYTES))
    assert len(encode(chunk)) == CHUNK_FRAME_BYTES_MAX
    assert decode(encode(chunk), LAPTOP) == chunk


# --- malformed -------------------------------------------------------------------------------------------------------------


def test_hand_made_malformed_frames_are_refused() -> None:
    frames = corpus.malformed()
    assert len(frames) >= 500
    assert [name for name, data in frames.items() if not isinstance(outcome(data), RemoteError)] == []
    assert all(error.penalty > 0 for error in map(outcome, frames.values()) if isinstance(error, RemoteError))
    assert max(len(str(outcome(data))) for data in frames.values()) < 200, "reasons are one short sentence"


def test_nothing_but_a_message_or_a_fault_and_little_memory(record_property: Callable[[str, object], None]) -> None:
    """W2 and W4 over everything: hand-made, bit flips, the heaviest, and 20,000 generated."""
    generated = list(corpus.mutations(GENERATED, GENERATED_SEED))
    groups = (corpus.malformed().values(), corpus.hostile().values(), corpus.heaviest().values(), generated)
    frames = [data for group in groups for data in group]
    messages = sum(not isinstance(outcome(data), RemoteError) for data in frames)
    assert 1000 < messages < len(frames) / 2, "a fair share of either"
    worst, ratio = _heaviest(frames)
    slowest = max(min(_seconds(data) for _ in range(3)) for data in frames)
    record_property("frames", len(frames))
    record_property("worst_share_of_the_allowance", round(ratio, 3))
    record_property("slowest_decode_ms", round(slowest * 1000, 3))
    assert ratio <= 1, f"{len(worst)} bytes starting {worst[:16].hex()} allocate {ratio:.2f} of the allowance"
    assert slowest < 0.5


def _seconds(data: bytes) -> float:
    started = time.perf_counter()
    outcome(data)
    return time.perf_counter() - started


def _heaviest(frames: Iterable[bytes]) -> tuple[bytes, float]:
    """The frame that takes most of its allowance (4 × its size + 1 MiB), and which part of it."""
    worst, most = b"", 0.0
    tracemalloc.start()
    try:
        for data in frames:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            outcome(data)
            share = (tracemalloc.get_traced_memory()[1] - before) / (4 * len(data) + (1 << 20))
            if share > most:
                worst, most = data, share
    finally:
        tracemalloc.stop()
    return worst, most


RSS = """
import re
from protocols.errors import RemoteError
from protocols.fields import UINT_MAX
from protocols.limits import LAPTOP
from protocols.wire import decode
from tests import corpus

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read()).group(1))

frames = sorted(corpus.heaviest().values(), key=len)
spare = bytearray(1 << 20); del spare
for data in frames:
    before = peak()
    try:
        decode(data, LAPTOP)
    except RemoteError:
        pass
    print(len(data), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_of_the_heaviest_frames() -> None:
    """What msgpack's C code takes is seen by the kernel only."""
    done = subprocess.run([sys.executable, "-c", RSS], cwd=ROOT, capture_output=True, text=True, check=True)
    grown = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(grown) > 30
    assert all(growth <= 4 * size + (1 << 20) for size, growth in grown), grown
    assert sum(growth for _, growth in grown) <= 2 << 20, "nor does it add up"


# --- round trips -----------------------------------------------------------------------------------------------------------

uints = st.integers(0, UINT_MAX)
indices = st.integers(0, INDEX_MAX)
flags = st.booleans()
peers = st.binary(min_size=32, max_size=32).map(PeerId)
digests = st.binary(min_size=32, max_size=32).map(Digest)
texts = st.text(max_size=50).filter(str.isprintable)
printable = st.characters(min_codepoint=0x20, max_codepoint=0x7E)
addresses = st.lists(st.text(printable, max_size=LAPTOP.address_bytes_max - 1).map("/".__add__), max_size=4).map(tuple)
contacts = st.builds(m.Contact, peers, addresses)
half = st.binary(min_size=16, max_size=16)
proofs = st.integers(0, 32).map(lambda n: bytes(range(n)) * 32)
offers = st.builds(
    lambda seed, sequence, age, samples, digest, size, pull: sign_offer(
        Identity(seed), golden.SCOPE, m.Offer(Identity(seed).peer, sequence, age, samples, digest, size), pull
    ),
    st.binary(min_size=32, max_size=32), uints, uints, uints, digests, uints, flags,
)  # fmt: skip
revocations = st.builds(m.Revocation, peers, peers, st.binary(max_size=m.SECRET_BYTES_MAX), st.binary(min_size=64, max_size=64))
counts = st.integers(0, (1 << 48) - 1)
rows = st.builds(lambda tag, a, b, head: Row(tag, min(a, b), max(a, b), head), half, counts, counts, half)
places = st.lists(st.builds(m.Place, half, counts, half), max_size=30).map(tuple)
payloads = st.binary(min_size=1, max_size=300)
runs = st.builds(
    lambda author, first, payload, signature: Run(author, first, len(payload), payload, signature),
    peers, st.integers(0, (1 << 48) - 2000), payloads, st.binary(min_size=64, max_size=64),
)  # fmt: skip
anything = st.one_of(
    st.builds(m.Hello, half, half, addresses),
    st.builds(m.Bye, st.sampled_from(m.Goodbye), texts),
    st.builds(m.ForwardJoin, contacts, st.integers(0, HOPS_MAX)),
    st.builds(m.Neighbour, flags, flags),
    st.builds(m.NeighbourReply, flags),
    st.builds(m.Shuffle, st.lists(contacts, max_size=8).map(tuple), flags),
    st.builds(m.Ping, uints),
    st.builds(m.Pong, uints),
    offers,
    st.builds(m.Want, digests, indices, indices),
    st.builds(m.Gone, digests),
    st.builds(m.Have, digests),
    st.builds(lambda signed, age_s: m.Brought(replace(signed, pull=False), age_s), offers, uints),
    st.builds(m.Away, uints),
    st.builds(m.Revocations, st.lists(revocations, min_size=1, max_size=8).map(tuple)),
    st.builds(m.RevocationsKnown, half),
    st.builds(m.Chunk, digests, indices, proofs, st.binary(max_size=200)),
    st.builds(m.Standing, half, counts, half, half, half, flags),
    st.builds(m.Vector, st.lists(rows, max_size=20).map(tuple), flags, flags),
    st.builds(m.Ask, st.lists(st.tuples(half, counts), min_size=1, max_size=LAPTOP.ask_items_max).map(tuple)),
    st.builds(m.Runs, st.lists(runs, min_size=1, max_size=20).map(tuple), st.sampled_from(m.Part)),
    st.builds(m.Prune, st.lists(half, min_size=1, max_size=64).map(tuple)),
    st.builds(m.Equivocation, st.builds(Proof, runs, runs)),
    st.builds(m.Floor, counts, st.lists(half, min_size=1, max_size=30).map(tuple), places),
    st.just(m.SnapshotAsk()),
    st.builds(m.SnapshotOffer, digests, st.integers(1, UINT_MAX), uints),
)


@given(anything)
@settings(max_examples=600, deadline=None)
def test_round_trip(message: m.Message) -> None:
    data = encode(message)
    assert decode(data, LAPTOP) == message
    assert encode(decode(data, LAPTOP)) == data
    for longer in (data + b"\x00", data[:-1]):
        if not isinstance(message, m.Chunk):
            assert isinstance(outcome(longer), RemoteError)


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_noise(data: bytes) -> None:
    for frame in (data, b"\x01" + data, *(bytes((1, kind)) + data for kind in Type)):
        outcome(frame)


def test_a_chunk_of_plain_data_is_not_copied() -> None:
    frame = encode(m.Chunk(golden.DIGEST, 0, b"", bytes(CHUNK_BYTES)))
    message = decode(frame, LAPTOP)
    assert isinstance(message, m.Chunk)
    assert isinstance(message.data, memoryview)
    assert message.data.obj is frame
