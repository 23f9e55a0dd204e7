"""The promise of the shared-seed mode: the same entries give the same ledger and the same bits, whatever happened on the way.

Examples are short programs of bytes, which Hypothesis makes and shrinks. The full form:
`LEDGER_EXAMPLES=10000 pytest --timeout 0`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.entries import Mark, Run, Span
from protocols.identity import PeerId
from protocols.ledger import Change
from tests.replicas import Replica, check_equal, codes_of, identity, meet_until_quiet, run_of

EXAMPLES = int(os.environ.get("LEDGER_EXAMPLES", "120"))
FULLY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
LENGTHS = (64, 1, 2, 3, 7, 16, 200, 255, 256, 300)

AUTHORS = (1, 2)
REPLICAS = (4, 5, 6)
LIARS = (7, 8)


class Program:
    """Bytes as choices; when they are used up, there are no more steps."""

    def __init__(self, data: bytes) -> None:
        self._bytes: Iterator[int] = iter(data)
        self.over = False

    def choose(self, count: int) -> int:
        """A number below `count`."""
        value = next(self._bytes, None)
        self.over = value is None
        return (value or 0) * count >> 8


def splits(number: int, length: int, program: Program) -> list[Run]:
    """An author's whole log in runs of chosen lengths, some of which overlap."""
    runs, last = [], 0
    while last < length:
        first = max(0, last - program.choose(4))
        last = min(length, max(first + LENGTHS[program.choose(len(LENGTHS))], last + 1))
        runs.append(run_of(number, first, codes_of(number, first, last)))
    return runs


def common_cut(replicas: list[Replica]) -> dict[PeerId, int]:
    """What all of them have of each author, and the same, down to a multiple of 256."""
    counts = {}
    for author in {author for replica in replicas for author in replica.ledger.authors}:
        count = min(replica.ledger.counts().get(author, 0) for replica in replicas) // 256 * 256
        if len({replica.ledger.head_at(author, count) for replica in replicas}) == 1:
            counts[author] = count
    return counts


def in_line(cut: tuple[Mark, ...], cuts: list[tuple[Mark, ...]]) -> bool:
    """Whether of this cut and any other one is ahead, and both are of the same logs: what a swarm has to hold."""
    here = {mark.author: mark for mark in cut}
    for other in cuts:
        there = {mark.author: mark for mark in other}
        signs = {_count(here, author) - _count(there, author) for author in here | there}
        shared = here.keys() & there.keys()
        clash = any(here[author].count == there[author].count and here[author] != there[author] for author in shared)
        if clash or (min(signs, default=0) < 0 < max(signs, default=0)):
            return False
    return True


def _count(marks: dict[PeerId, Mark], author: PeerId) -> int:
    return marks[author].count if author in marks else 0


@FULLY
@given(st.binary(min_size=40, max_size=240))
def test_any_order_any_split_any_repetition_gives_the_same_bits(data: bytes) -> None:
    program = Program(data)
    lengths = {number: LENGTHS[program.choose(len(LENGTHS))] + program.choose(2) * 240 for number in AUTHORS}
    runs = [run for number in AUTHORS for _ in range(2) for run in splits(number, lengths[number], program)]
    replicas = [Replica(number) for number in REPLICAS]
    while not program.over:
        replica = replicas[program.choose(len(replicas))]
        match program.choose(16):
            case 0:
                replica.restart(sum_too=program.choose(4) == 0)
            case 1:
                replica.compact(replica.ledger.cut_at(common_cut(replicas)))
            case 2 | 3:
                snapshot = replicas[program.choose(len(replicas))].snapshot
                assert snapshot is None or replica.adopt(snapshot) or replica.ledger.refusal(snapshot.cut) == "behind ours"
            case 4 | 5 | 6:
                number = AUTHORS[program.choose(len(AUTHORS))]
                replica.hear(*(run for run in runs if run.author == identity(number).peer))
            case _:
                replica.hear(runs[program.choose(len(runs))])
    for replica in replicas:
        for run in sorted(runs, key=lambda run: run.first):
            replica.hear(run)
        assert replica.ledger.entries == sum(lengths.values())
    check_equal(replicas)
    whole = Replica(9)
    whole.take(Change(tuple(Span(identity(number).peer, 0, codes_of(number, 0, lengths[number])) for number in AUTHORS)))
    assert whole.sums.digest() == replicas[0].sums.digest()


def lie(replica: Replica, number: int, program: Program) -> Run:
    """A run of a liar that goes on where a replica has ended, or goes back; one of a few versions from some step on."""
    length, version = LENGTHS[program.choose(len(LENGTHS))], max(0, program.choose(12) - 8)
    end = replica.ledger.counts().get(identity(number).peer, 0)
    first = max(0, end - (0, 0, 0, 0, 1, 5, 255, 300)[program.choose(8)])
    split = (0, 10, 255, 256, 300, 520)[program.choose(6)]
    codes = bytearray(codes_of(number, first, first + length))
    for step in range(max(split, first), first + length):
        codes[step - first] = (codes[step - first] + version) % 128
    return run_of(number, first, bytes(codes))


@FULLY
@given(st.binary(min_size=40, max_size=240))
def test_whatever_liars_sign_all_end_with_the_same_and_no_honest_entry_is_lost(data: bytes) -> None:
    program = Program(data)
    replicas = [Replica(number) for number in REPLICAS]
    said: dict[PeerId, list[Run]] = {replica.peer: [] for replica in replicas}
    measured = dict.fromkeys(said, b"")
    cuts: list[tuple[Mark, ...]] = []
    while not program.over:
        replica = replicas[program.choose(len(replicas))]
        match program.choose(12):
            case 0:
                replica.restart(sum_too=program.choose(4) == 0)
            case 1 | 6:
                present = replicas[: 2 + program.choose(2)]
                cut = replica.ledger.cut_at(common_cut(present)) if replica in present else ()
                if cut and in_line(cut, cuts):
                    replica.compact(cut)
                    cuts.append(cut)
            case 2:
                replica.ask(replicas[program.choose(len(replicas))])
            case 3:
                codes = codes_of(9, 0, LENGTHS[program.choose(len(LENGTHS))], program.choose(8))
                measured[replica.peer] += codes
                replica.probe(codes)
            case 4:
                said[replica.peer] += replica.say(replica.ledger.next_step - program.choose(3), 1 + program.choose(300))
            case 5:
                other = replicas[program.choose(len(replicas))]
                replica.hear(*said[other.peer][-3:])
            case _:
                replica.hear(lie(replica, LIARS[program.choose(len(LIARS))], program))
    for replica in replicas:
        said[replica.peer] += replica.say(replica.ledger.next_step, 256)
    meet_until_quiet(replicas)
    check_equal(replicas)
    for peer, codes in measured.items():
        assert replicas[0].ledger.counts().get(peer, 0) == len(codes)
        for replica in replicas:
            base = {mark.author: mark.count for mark in replica.ledger.cut}.get(peer, 0)
            held = b"".join(span.codes for span in replica.ledger.spans_after({}) if span.author == peer)
            assert held == codes[base:]
