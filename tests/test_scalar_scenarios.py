"""What shared-seed mode brings to the simulator: its scenario keys, starts and shifts, liars, disks, and checks that can fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from protocols.codes import CODES
from protocols.core import swarm_digest
from protocols.effects import Adopt, Apply, Compact, Effect, Fingerprint, Log, Probe, Send, Trim
from protocols.entries import Mark, Run, Span
from protocols.errors import RemoteError
from protocols.events import Adopted, Applied, Compacted, Event, Fingerprinted, Logged, Probed
from protocols.forks import sign_run
from protocols.identity import Identity, PeerId
from protocols.ledger import Ledger
from protocols.limits import LAPTOP
from protocols.merkle import Digest, Tree
from protocols.messages import Part, Runs
from protocols.recipe import Recipe
from protocols.wire import decode, encode
from simulations.adversary import equivocation, rubbish
from simulations.checks import Checks
from simulations.disk import Disk, opened, packed
from simulations.errors import ScenarioError
from simulations.learners import Learners
from simulations.ledger_checks import LedgerChecks
from simulations.models import convolutional, shift_named
from simulations.nemesis import Act, schedule
from simulations.prober import Prober
from simulations.rules import DROP, PASS, Kind, Packet, partition
from simulations.scenario import Scenario, build
from simulations.world import World

SCOPE = swarm_digest("test") + bytes(16)
SMALL = {
    "nodes": 4, "seconds": 60.0, "hidden": [4], "same_init": True,
    "protocol": "scalars", "scalar_lr": 1e-3, "epsilon": 1e-3, "scale": 4.0,
}  # fmt: skip
RECIPE = Recipe(lr=1e-3, epsilon=1e-3, scale=4.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "p2pnode" / "pretrained"


def small(**changes: Any) -> Scenario:
    return build({**SMALL, **changes})


# --- scenarios --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"protocol": "scalar"}, "no protocol 'scalar' .did you mean 'scalars'"),
        ({"same_init": False}, "set same_init=true or pretrain_steps"),
        ({"shift": "mirrored"}, "no shift 'mirrored'"),
        ({"convolutional": True}, "leave one out"),
        ({"garblers": 2, "equivocators": 2}, "liars are no bootstraps"),
    ],
)
def test_a_wrong_scenario_is_told_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"code": "logg"}, "no code 'logg'"), ({"scalar_lr": 1e-12}, "scalar_lr"), ({"schedule": "cosine"}, "needs a horizon")],
)
def test_a_wrong_recipe_is_told_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ScenarioError, match=sentence) as caught:
        Learners(small(**changes), World(1), 4)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_the_tasks_with_the_scenarios_changes() -> None:
    learners = Learners(small(code="sign", scalar_lr=0.5, epsilon=0.25, scale=2.0, schedule="linear", horizon=10), World(1), 4)
    assert learners.recipe == Recipe(0.5, 0.25, 2.0, "sign", "linear", 10)
    other = Learners(small(code="sign", scalar_lr=0.4, epsilon=0.25, scale=2.0, schedule="linear", horizon=10), World(1), 4)
    assert learners.digest != other.digest, "nodes of two recipes refuse each other"
    assert learners.schema.digest == other.schema.digest


def test_halves_hear_nothing_of_each_other() -> None:
    rule = partition({1, 2})
    for kind in Kind:
        verdicts = {(a, b): rule(Packet(kind, a, b, 100, 0.0)) for a in range(4) for b in range(4)}
        assert {pair for pair, verdict in verdicts.items() if verdict == DROP} == {(a, b) for a in (0, 3) for b in (1, 2)} | {
            (b, a) for a in (0, 3) for b in (1, 2)
        }
        assert set(verdicts.values()) == {DROP, PASS}


def test_who_vanishes_comes_back_while_there_are_faults() -> None:
    churn = {"nodes": 100, "seconds": 600.0, "leave_per_minute": 0.1, "crash_share": 0.5, "heal_s": 100.0}
    forever, acts = (schedule(small(**churn, return_s=back), Random(1)) for back in (0.0, 200.0))
    assert all(one.back == math.inf for one in forever)
    gone = [one for one in acts if one.act is Act.VANISH]
    assert len(gone) > 20
    assert all(one.at + 100 <= one.back <= 500 or one.back == 500 for one in gone)
    assert sum(one.back < 500 for one in gone) > 10
    assert all(one.back == math.inf for one in acts if one.act is Act.LEAVE)


# --- starts and shifts ------------------------------------------------------------------------------------------------


def test_a_pretrained_start_is_made_once_and_is_everybodys(cache: Path) -> None:
    def starts(**changes: Any) -> list[dict[str, Tensor]]:
        learners = Learners(small(**{"hidden": [8], "pretrain_steps": 30, "same_init": False, **changes}), World(1), 4)
        return [learners.fleet.row(row) for row in range(4)]

    first = starts()
    files = list(cache.iterdir())
    assert [path.suffix for path in files] == [".safetensors"]
    before = files[0].stat().st_mtime_ns
    again = starts(shift="inverted")
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before], "the shift is nothing that one pretrains on"
    for name, value in first[0].items():
        assert all(torch.equal(value, row[name]) for row in (*first, *again))
    files[0].write_bytes(b"torn")
    assert torch.equal(starts()[0]["1.weight"], first[0]["1.weight"])
    assert not torch.equal(starts(pretrain_steps=31)[0]["1.weight"], first[0]["1.weight"])
    assert len(list(cache.iterdir())) == 2


def test_what_is_shifted_is_unlearned_and_can_be_learned() -> None:
    def accuracy(**changes: Any) -> float:
        learners = Learners(small(**{"hidden": [], "convolutional": True, "pretrain_steps": 200, **changes}), World(1), 4)
        return learners.accuracies([learners.fleet.row(0)])[0]

    assert accuracy() > 0.9
    assert accuracy(shift="inverted") < 0.3
    assert accuracy(shift="rotated") < 0.5


def test_shifts_keep_form_and_range() -> None:
    images = torch.arange(18.0).reshape(2, 9)
    turned, negative = shift_named("rotated", images)(images), shift_named("inverted", images)(images)
    assert turned[0].tolist() == [2, 5, 8, 1, 4, 7, 0, 3, 6]
    assert negative[0].tolist() == [17 - x for x in range(9)]
    assert shift_named("", images)(images) is images
    with pytest.raises(ScenarioError, match="no square image"):
        convolutional(10, 2)


# --- liars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_equivocator_signs_two_things_of_each_step(code: str) -> None:
    liar, recipe = Identity(b"l" * 32), Recipe(1e-3, 1e-3, 4.0, code)
    codes = b"".join(recipe.encode(gradient) for gradient in (1.0, -2.0, 0.5))
    run = sign_run(liar, SCOPE, 0, 3, recipe.rule.pack(codes))
    twist = equivocation(liar, SCOPE, recipe)
    ledger = Ledger(Identity(b"o" * 32).peer, SCOPE, recipe.rule, LAPTOP)
    heard = [one for key in (b"a" * 32, b"b" * 32) for frame in twist(PeerId(key), run, Part.NEWS) for one in _runs(frame)]
    assert len(heard) == 2
    changes = [ledger.add(one, 0.0) for one in heard]
    assert changes[0].add
    assert changes[1].proof is not None
    assert ledger.voided == (liar.peer,)


@pytest.mark.parametrize("code", sorted(CODES))
def test_rubbish_is_refused(code: str) -> None:
    liar, recipe = Identity(b"l" * 32), Recipe(1e-3, 1e-3, 4.0, code)
    twist = rubbish(liar, SCOPE, recipe, Random(3))
    run = sign_run(liar, SCOPE, 0, 20, recipe.rule.pack(recipe.encode(1.0) * 20))
    refused = taken = 0
    for _ in range(200):
        ledger = Ledger(Identity(b"o" * 32).peer, SCOPE, recipe.rule, LAPTOP)
        for frame in twist(PeerId(b"a" * 32), run, Part.NEWS):
            try:
                taken += sum(bool(ledger.add(one, 0.0).add) for one in _runs(frame))
            except RemoteError:
                refused += 1
    assert refused > 100
    assert taken == 0 or code != "float32", "where most bytes mean something, some rubbish does"


def _runs(frame: bytes) -> tuple[Run, ...]:
    message = decode(frame, LAPTOP)
    assert isinstance(message, Runs)
    return message.runs


# --- a node's training process and disk ---------------------------------------------------------------------------------


class Machine:
    """A host that notes what it is told, with a real model and a disk."""

    def __init__(self, disk: Disk, life: int = 1) -> None:
        self.world, self.alive = World(1), True
        self.told: list[Event] = []
        self.blobs: dict[Digest, bytes] = {}
        self.complaints: list[str] = []
        self.me = Identity(b"m" * 32).peer
        learners = Learners(small(), World(1), 4)
        self.prober = Prober(self, learners.pupil(0, self.me, life), disk, self.world, lambda probes: probes * 0.1, 0.01, 0.005)

    def handle(self, event: Event) -> None:
        self.told.append(event)

    def keep(self, data: bytes) -> Digest:
        digest = Tree.of(data).digest
        self.blobs[digest] = data
        return digest

    def held(self, digest: Digest) -> bytes | None:
        return self.blobs.get(digest)

    def violated(self, rule: str, text: str) -> None:
        self.complaints.append(f"{rule} {text}")

    def does(self, effect: Effect) -> Event:
        before = len(self.told)
        if isinstance(effect, Log | Trim):
            self.prober.write(effect)
        else:
            assert isinstance(effect, Probe | Apply | Fingerprint | Compact | Adopt)
            self.prober.work(effect)
        self.world.run(self.world.now + 10.0)
        return self.told[-1] if len(self.told) > before else Applied()


def test_probes_take_their_time_and_are_in_the_sum() -> None:
    machine = Machine(Disk())
    machine.prober.work(Probe(0, 20))
    machine.world.run(1.9)
    assert machine.told == []
    machine.world.run(2.1)
    probed = machine.told[0]
    assert isinstance(probed, Probed)
    assert (probed.first, len(probed.codes)) == (0, 20)
    assert 1.5 < probed.loss < 4.0
    assert machine.prober.pupil.spsa.counts == {machine.me: 20}
    other = Machine(Disk())
    other.does(Apply((Span(machine.me, 0, probed.codes),)))
    assert other.does(Fingerprint()) == machine.does(Fingerprint()) == Fingerprinted(machine.prober.pupil.spsa.digest)


def test_a_snapshot_is_the_sum_without_its_tail_and_adopting_it_gives_the_sum() -> None:
    author, marks = PeerId(b"a" * 32), (Mark(PeerId(b"a" * 32), 256, b"c" * 32),)
    codes = bytes(range(1, 128)) * 3
    one, other, empty = Machine(Disk()), Machine(Disk()), Machine(Disk())
    one.does(Apply((Span(author, 0, codes),)))
    other.does(Apply((Span(author, 0, codes[:256]),)))
    compacted = one.does(Compact(marks, (Span(author, 256, codes[256:]),)))
    assert compacted == other.does(Compact(marks, ()))
    assert isinstance(compacted, Compacted)
    assert (one.complaints, one.prober.pupil.spsa.counts) == ([], {author: 381})
    data = one.blobs[compacted.digest]
    assert opened(data)[0] == marks
    assert packed(*opened(data)) == data
    empty.keep(data)
    assert empty.does(Adopt(compacted.digest)) == Adopted(marks)
    empty.does(Apply((Span(author, 256, codes[256:]),)))
    assert empty.prober.pupil.spsa.digest == one.prober.pupil.spsa.digest
    assert empty.does(Adopt(Digest(bytes(32)))) == Adopted((), "it isn't here")
    assert empty.does(Adopt(empty.keep(data[:-4]))).reason.startswith("a sum of")  # type: ignore[union-attr]
    assert empty.prober.pupil.spsa.digest == one.prober.pupil.spsa.digest
    one.does(Compact(marks, ()))
    assert one.complaints == ["S6 compacts another sum than that of the cut"]
    one.does(Apply((Span(author, 500, b"\x01"),)))
    assert one.complaints[1].startswith("S6 is told to apply what can't be")


def test_a_crash_keeps_what_was_durable_and_nothing_else() -> None:
    disk, key = Disk(), Identity(b"a" * 32)
    codes = bytes(range(1, 128)) * 3
    machine = Machine(disk)
    low, high = (sign_run(key, SCOPE, first, 256, (codes * 2)[first : first + 256]) for first in (0, 256))
    assert machine.does(Log(1, (low,))) == Logged(1)
    machine.prober.write(Log(2, (high,)))
    machine.alive = False
    machine.world.run(machine.world.now + 10.0)
    assert machine.told == [Logged(1)]
    assert disk.restored().runs == (low,)
    machine = Machine(disk, life=2)
    machine.does(Apply((Span(key.peer, 0, codes[:256]),)))
    machine.does(Compact((Mark(key.peer, 256, b"c" * 32),), ()))
    machine.does(Log(3, (high,)))
    machine.does(Trim((Mark(key.peer, 256, b"c" * 32),)))
    restored = disk.restored()
    assert restored.runs == (high,)
    assert restored.cut == (Mark(key.peer, 256, b"c" * 32),)
    again = Machine(disk, life=3)
    assert again.prober.pupil.spsa.digest == machine.prober.pupil.spsa.digest
    assert restored.snapshot is not None
    assert again.held(restored.snapshot[0]) == disk.snapshot


# --- checks -----------------------------------------------------------------------------------------------------------


class Watched:
    """The book, and what nodes 0 and 1 would do; node 2 is known to lie."""

    def __init__(self) -> None:
        self.checks = Checks(LAPTOP, SCOPE, 100, overlay=True)
        self.keys = [Identity(bytes([97 + who]) * 32) for who in range(3)]
        self.book = LedgerChecks(self.checks, LAPTOP, RECIPE, frozenset([self.keys[2].peer]))
        self.numbers: Iterator[int] = iter(range(1000))

    def run(self, author: int, first: int, codes: bytes) -> Run:
        return sign_run(self.keys[author], SCOPE, first, len(codes), codes)

    def logs(self, who: int, run: Run) -> list[str]:
        before, number = len(self.checks.violations), next(self.numbers)
        self.book.after(0.0, who, self.keys[who].peer, [Log(number, (run,))])
        self.book.before(0.0, who, Logged(number))
        return self.checks.violations[before:]

    def says(self, who: int, run: Run) -> list[str]:
        before = len(self.checks.violations)
        frame = encode(Runs((run,), Part.NEWS))
        self.book.after(0.0, who, self.keys[who].peer, [Send(PeerId(b"x" * 32), frame)])
        return self.checks.violations[before:]


def test_what_is_said_was_logged_and_is_the_same() -> None:
    watched = Watched()
    assert watched.logs(0, watched.run(0, 0, b"\x01\x02")) == []
    assert watched.says(0, watched.run(0, 0, b"\x01\x02")) == []
    assert "two entries are known of step 1" in watched.says(0, watched.run(0, 0, b"\x01\x03"))[0]
    assert "before they are logged" in watched.says(0, watched.run(0, 0, b"\x01\x02\x03"))[0]
    assert "a gap before step 9" in watched.logs(1, watched.run(0, 9, b"\x01"))[0]
    assert watched.says(1, watched.run(0, 0, b"\x07")) == [], "what one forwards of others is theirs"
    assert all(text.startswith("S3") for text in watched.checks.violations)
    clean = Watched()
    assert clean.logs(0, clean.run(2, 0, b"\x01")) == clean.logs(1, clean.run(2, 0, b"\x02")) == [], "a liar may"


def test_lost_entries_and_wrong_sums_are_seen() -> None:
    watched, learners = Watched(), Learners(small(), World(1), 4)
    pupils = {who: learners.pupil(who, watched.keys[who].peer, 1) for who in range(2)}
    me = watched.keys[0].peer
    watched.logs(0, watched.run(0, 0, b"\x01\x02\x03"))
    pupils[0].change([Span(me, 0, b"\x01\x02\x03")], [])
    pupils[1].change([Span(me, 0, b"\x01")], [])
    assert watched.book.lost(pupils) == (3, 2)
    watched.book.promise(0.0, watched.book.end(0.0, pupils, [], None))
    assert [text.partition(": ")[2] for text in watched.checks.violations] == [
        "2 of 3 entries are lost to somebody", "ends with 0 ledgers and 2 sums",
    ]  # fmt: skip
    pupils[1].change([Span(me, 0, b"\x01\x02\x03\x04")], [])
    watched.book.add_up(0.0, 1, pupils[1])
    assert "nobody made durable" in watched.checks.violations[2]
    pupils[0].change([Span(me, 0, b"\x01\x02\x03")], [Span(me, 0, b"\x01\x02\x03")])
    pupils[0].change([Span(me, 0, b"\x01\x02\x04")], [Span(me, 0, b"\x01\x02\x03")])
    watched.book.add_up(0.0, 0, pupils[0])
    assert "another sum than its entries add up to" in watched.checks.violations[3]
