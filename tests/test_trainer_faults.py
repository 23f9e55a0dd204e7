"""Training processes that hang, are killed, or find the disk full: none is lost, and none takes anything along."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

import p2pnode.pulse
from p2pnode.errors import ConfigError, DiskError
from p2pnode.learner import Learner
from p2pnode.pulse import FIRST_S, PATIENCE_FACTOR, PATIENCE_S_MIN, START_S_MIN, Patience, Pulse
from p2pnode.trainer import Trainer, TrainerError, TrainerSettings
from protocols.entries import Mark, Span
from protocols.identity import PeerId
from tests.scalar_nodes import state
from tests.tally import tally

pytestmark = pytest.mark.timeout(120)  # a child takes 3 s to import torch, and a few times that on a loaded machine

LARGE = "tests.small_task:make_large_task"  # 400 kB
ME, OTHER = PeerId(b"m" * 32), PeerId(b"o" * 32)

TASKS = """
import ctypes, pathlib, time
from itertools import count
import torch
from tests import checkpoint_tasks

HERE = pathlib.Path(__file__).parent

def first_time(name):
    if (HERE / name).exists():
        return False
    (HERE / name).touch()
    return True

def troubled(shard):
    task, steps = checkpoint_tasks.secretive(shard), count()
    loss = task.loss

    def told(outputs, targets):
        if torch.is_grad_enabled():
            step = next(steps)
            if step == 3 and first_time("crashed"):
                ctypes.string_at(0)
            if step == 5 and first_time("slow"):
                time.sleep(2)
            if step == 30 and first_time("hung"):
                while True:
                    ctypes.PyDLL(None).pause()  # and nobody else gets the interpreter
        return loss(outputs, targets)

    task.loss = told
    return task
"""

Make = Callable[..., Trainer]


@pytest_asyncio.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    (tmp_path / "user_task.py").write_text(TASKS)
    trainers: list[Trainer] = []

    def made(task: str, folder: str = "one", **settings: object) -> Trainer:
        spec = task if ":" in task or task == "digits" else f"{tmp_path}/user_task.py:{task}"
        chosen = {"init_seed": 7, "swarm": bytes(16), "author": ME, **settings}
        trainers.append(Trainer(TrainerSettings(spec, **chosen), tmp_path / folder / "blobs"))  # type: ignore[arg-type]
        return trainers[-1]

    yield made
    await asyncio.gather(*(trainer.stop() for trainer in trainers))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for seconds in a test waits for too long."""
    monkeypatch.setattr(p2pnode.pulse, "PATIENCE_S_MIN", 1.0)
    monkeypatch.setattr(p2pnode.pulse, "PATIENCE_FACTOR", 2.0)


def pid_of(trainer: Trainer) -> int:
    assert trainer.pid is not None
    return trainer.pid


def kill(trainer: Trainer) -> None:
    os.kill(pid_of(trainer), signal.SIGKILL)


def room(trainer: Trainer, size: int) -> None:
    """From now on the child's disk takes `size` bytes of a file, and then says that there is no more."""
    _, hard = resource.prlimit(pid_of(trainer), resource.RLIMIT_FSIZE)
    resource.prlimit(pid_of(trainer), resource.RLIMIT_FSIZE, (size, hard))


def names_in(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# --- hanging ------------------------------------------------------------------------------------------------------------


async def test_whatever_becomes_of_a_step_training_goes_on_and_the_log_says_where_it_was(
    make: Make, impatient: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """It crashes in native code, takes long, which is nobody's fault, and hangs in native code; and its optimizer has secrets."""
    trainer, path = make("troubled"), tmp_path / "c.safetensors"
    assert (await trainer.train(20)).steps == 20
    assert trainer.restarts == 1, "the crash, and not the slow step"
    assert "SIGSEGV" in caplog.text
    assert "user_task.py" in caplog.text
    for _ in range(3):
        await trainer.checkpoint(path, {})
    assert caplog.text.count("the optimizer's state can't be kept (it holds a object)") == 1, "said once"
    caplog.clear()
    assert (await trainer.train(20)).steps == 20
    assert trainer.restarts == 2
    [line] = [record.getMessage() for record in caplog.records if "did nothing for" in record.getMessage()]
    assert 'user_task.py", line' in line
    assert "in told" in line


def test_patience_follows_what_was_measured() -> None:
    patience = Patience()
    assert patience.seconds("start", first=True) == float("inf"), "data may be downloaded for hours"
    patience.note("start", 2.0, first=True)
    assert patience.seconds("start", first=True) == START_S_MIN
    patience.note("start", 60.0, first=True)
    assert patience.seconds("start", first=True) == 60 * PATIENCE_FACTOR
    assert patience.seconds("train", first=True) == FIRST_S
    patience.note("train", 3.0, first=True)
    patience.note("train", 0.5, first=False)
    assert patience.seconds("train", first=False) == PATIENCE_S_MIN, "the first step's slowness says nothing of the others"
    assert patience.seconds("train", first=True) == 3 * PATIENCE_FACTOR, "but of the next process's first"
    patience.note("train", 4.0, first=False)
    patience.note("train", 1.0, first=False)
    assert patience.seconds("train", first=False) == 4 * PATIENCE_FACTOR
    for first in (True, False):
        assert patience.seconds("merge", first=first) == FIRST_S
    patience.note("merge", 50.0, first=True)
    assert patience.seconds("merge", first=False) == 50 * PATIENCE_FACTOR


def test_words_are_few_and_tell_of_work_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told, settled = 0.0, [], []
    monkeypatch.setattr(p2pnode.pulse.time, "monotonic", lambda: now)
    pulse = Pulse(told.append, lambda: settled.append(now))
    for _ in range(1000):
        now += 0.01
        pulse.beat()
    assert len(told) == len(settled) == pytest.approx(20, abs=1)
    now += 7.0
    pulse.beat()
    assert told[-1] == pytest.approx(7.0, abs=0.5)
    now += 3.0
    assert pulse.silent_s == pytest.approx(3.0, abs=0.5)


# --- killed -------------------------------------------------------------------------------------------------------------


async def test_killed_anywhere_and_resumed_anywhere_digits_come_out_the_same(make: Make, tmp_path: Path) -> None:
    straight, killed = learner(tmp_path / "straight", "digits", measure_alone=True), make("digits", measure_alone=True)
    expected = [straight.train(15) for _ in range(3)]
    path = tmp_path / "00000001.safetensors"
    await killed.train(15)
    result = await killed.checkpoint(path, {"sequence": "1", "age": "15"})
    assert (result.steps, result.size, result.remarks) == (15, path.stat().st_size, ())
    kill(killed)
    found = [await killed.train(15)]
    assert killed.restarts == 1
    await killed.checkpoint(path, {})
    await killed.stop()
    other = make("digits", "other", measure_alone=True, resume=path)
    ready = await other.start()
    assert (ready.steps, ready.remarks) == (30, ())
    found.append(await other.train(15))
    failed = sum(one.digest != two.digest for one, two in zip(found, expected[1:], strict=True))
    tally("a training process killed and started anew: the same bits", failed, len(found))
    assert not failed
    assert (await other.evaluate()).alone_accuracy == straight.evaluate().alone_accuracy


# --- no room --------------------------------------------------------------------------------------------------------------


async def test_a_full_disk_ends_no_process_and_loses_no_step(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, peer = make(LARGE, shard_count=2), learner(tmp_path / "peer", LARGE)
    theirs = peer.train(3)
    given = (theirs.digest, peer.blobs / theirs.digest.hex(), 1.0)
    ready = await trainer.start()
    path, blobs = tmp_path / "c.safetensors", tmp_path / "one" / "blobs"
    before = await trainer.train(5)
    await trainer.checkpoint(path, {})
    pid, good = trainer.pid, path.read_bytes()
    room(trainer, before.size // 2)
    caplog.clear()
    for _ in range(3):
        result = await trainer.train(5)
        assert (result.digest, result.steps) == (before.digest, 0)
        assert result.loss > 0
        assert "can't be written to" in result.unkept
    merged = await trainer.merge(1.0, [given])
    assert (merged.kept, merged.digest, merged.used, merged.faults) == (False, before.digest, (theirs.digest,), ())
    assert "can't be written to" in merged.unkept
    with pytest.raises(DiskError, match=r"checkpoint can't be written to .* make room there"):
        await trainer.checkpoint(path, {})
    with pytest.raises(ConfigError, match="give a path that can be written"):
        await trainer.save(tmp_path / "out.safetensors", {})
    assert path.read_bytes() == good
    assert names_in(blobs) == {ready.digest.hex(), before.digest.hex()}, "and nothing lies about"
    assert names_in(tmp_path) == {"one", "peer", "c.safetensors", "user_task.py"}
    room(trainer, 1 << 30)
    after = await trainer.train(5)
    assert (after.steps, after.unkept) == (20, ""), "what was learnt meanwhile is there"
    merged = await trainer.merge(1.0, [given])
    assert (merged.kept, merged.unkept) == (True, "")
    assert (await trainer.checkpoint(path, {})).steps == 25
    assert (trainer.pid, trainer.restarts, caplog.text) == (pid, 0, "")
    os.kill(pid_of(trainer), signal.SIGSTOP)
    asked = asyncio.create_task(trainer.checkpoint(tmp_path / "d.safetensors", {}))
    await asyncio.sleep(0)
    await asyncio.to_thread((tmp_path / ".d.safetensors.tmp").write_bytes, b"half of it")
    await trainer.stop()
    with pytest.raises(TrainerError, match="stopped"):
        await asked
    assert names_in(tmp_path) == {"one", "peer", "c.safetensors", "user_task.py"}, "it was killed while it wrote"


async def test_a_sum_that_finds_no_room_changes_nothing(make: Make, tmp_path: Path) -> None:
    trainer, giver = make(LARGE, protocol="scalars"), learner(tmp_path / "two", LARGE, protocol="scalars")
    assert giver.scalars is not None
    span = Span(OTHER, 0, bytes(i % 127 + 1 for i in range(300)))
    cut, tail = [Mark(OTHER, 256, b"c" * 32)], [Span(OTHER, 256, span.codes[256:])]
    giver.scalars.apply([span], [])
    made = giver.scalars.compact(cut, tail)
    await trainer.start()
    await trainer.restore(lambda: (None, (span,)))
    before, pid = await trainer.fingerprint(), trainer.pid
    room(trainer, made.size // 2)
    for _ in range(2):
        with pytest.raises(DiskError, match="the sum can't be kept in"):
            await trainer.compact(cut, tail)
        with pytest.raises(DiskError, match="the sum can't be kept in"):
            await trainer.adopt(made.digest, giver.blobs / made.digest.hex())
        with pytest.raises(DiskError):
            await trainer.checkpoint(tmp_path / "c.safetensors", {})
        assert await trainer.fingerprint() == before
    assert names_in(tmp_path / "one") == {"blobs"}
    room(trainer, 1 << 30)
    assert await trainer.compact(cut, tail) == made
    assert (await trainer.adopt(made.digest, giver.blobs / made.digest.hex())).reason == ""
    assert trainer.pid == pid
    await trainer.checkpoint(tmp_path / "c.safetensors", {})


def test_both_kinds_of_learning_survive_a_full_disk_in_one_model(tmp_path: Path) -> None:
    """What local steps have learnt stays in the model when the sum moves, though no file holds it."""
    nodes = [learner(tmp_path / name, "tests.small_task:make_large_task", protocol="both") for name in ("full", "free")]
    span = Span(OTHER, 0, bytes(i % 127 + 1 for i in range(40)))
    results = []
    for number, one in enumerate(nodes):
        assert one.scalars is not None
        one.train(3)
        with little_room(1000 if number == 0 else 1 << 30):
            assert one.train(4).steps == 4 * number
            one.scalars.apply([span], [])
            one.probe(0, 5)
        results.append(one.train(4))
    assert [one.steps for one in results] == [8, 4]
    assert results[0].digest == results[1].digest
    assert state(nodes[0]) == state(nodes[1])


def test_a_start_without_room_is_one_sentence(tmp_path: Path) -> None:
    with little_room(10), pytest.raises(DiskError, match=r"the model can't be written to .*; make room there\.") as caught:
        learner(tmp_path, "tests.small_task:make_task")
    assert "\n" not in str(caught.value)


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """As `room`, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def learner(folder: Path, task: str, **more: object) -> Learner:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    chosen = {"init_seed": 7, "swarm": bytes(16), "author": ME, **more}
    return Learner(TrainerSettings(task, **chosen), folder / "blobs", None)  # type: ignore[arg-type]
