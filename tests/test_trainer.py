"""The training process as its parent sees it: real processes that are killed, crash, hang and talk too much."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors import safe_open

import p2pnode.trainer
from p2pnode.errors import ConfigError
from p2pnode.trainer import Trainer, TrainerError, TrainerSettings
from protocols.merkle import Tree

pytestmark = pytest.mark.timeout(90)  # a child takes 3 s to import torch, and a few times that on a loaded machine

TASKS = """
import os, pathlib, signal, time
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from p2pnode import Shard, Task

print("a task may print what it likes" * 3)
HERE = pathlib.Path(__file__).parent

def tell():  # the test waits at the other end
    with open(HERE / "fifo", "w"): pass

class Net(nn.Linear):
    def __init__(self, while_training):
        super().__init__(3, 3)
        self.while_training, self.told = while_training, False
    def forward(self, inputs):
        if self.training:
            self.while_training(self)
        return super().forward(inputs)

def task(while_training):
    data = (torch.randn(64, 3), torch.arange(64) % 3)
    return Task(Net(while_training), data, data, cross_entropy, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))

def quick(shard): return task(lambda net: None)

def slow(shard):
    def step(net):
        if not net.told:
            net.told = True
            tell()
        time.sleep(0.005)
    return task(step)

def endless(shard):
    def step(net):
        tell()
        torch.linalg.svd(torch.randn(6000, 6000))  # minutes in native code
    return task(step)

def dies_once(shard):
    def step(net):
        if not (HERE / "died").exists():
            (HERE / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return task(step)

def always_exits(shard): return task(lambda net: os._exit(3))

def always_raises(shard):
    def step(net): raise RuntimeError("no luck today")
    return task(step)

def bad(shard):
    return undefined_name
"""

NewTrainer = Callable[..., Trainer]


@pytest_asyncio.fixture
async def new_trainer(tmp_path: Path) -> AsyncIterator[NewTrainer]:
    """Makes trainers of the tasks above; at the end all are stopped and nothing is left of them."""
    (tmp_path / "user_task.py").write_text(TASKS)
    os.mkfifo(tmp_path / "fifo")
    trainers: list[Trainer] = []

    def make(task: str, folder: str = "blobs", **settings: object) -> Trainer:
        spec = task if task == "digits" else f"{tmp_path}/user_task.py:{task}"
        trainers.append(Trainer(TrainerSettings(spec, **{"init_seed": 7, **settings}), tmp_path / folder))  # type: ignore[arg-type]
        return trainers[-1]

    yield make
    pids = [trainer.pid for trainer in trainers if trainer.pid is not None]
    await asyncio.gather(*(trainer.stop() for trainer in trainers))
    assert not [pid for pid in pids if exists(pid)]


def exists(pid: int) -> bool:
    """Whether there is such a process, a zombie too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def told(folder: Path) -> None:
    """Wait until the child is in the middle of a training step."""
    await asyncio.wait_for(asyncio.to_thread((folder / "fifo").read_bytes), 60)


def pid_of(trainer: Trainer) -> int:
    assert trainer.pid is not None
    return trainer.pid


async def test_models_pass_as_blobs_between_two_trainers_of_one_process(new_trainer: NewTrainer, tmp_path: Path) -> None:
    one, two = (new_trainer("digits", str(i), shard_index=i, shard_count=2, alpha=0.3) for i in range(2))
    ready, other = await asyncio.gather(one.start(), two.start())
    assert ready.digest == other.digest  # the same start
    assert ready.schema_digest == other.schema_digest
    assert ready.samples + other.samples == 1437
    assert (ready.parameters, ready.steps, ready.device) == (4810, 0, "cpu")
    trained, _ = await asyncio.gather(one.train(40), two.train(20))
    content = (tmp_path / "0" / trained.digest.hex()).read_bytes()
    assert len(content) == trained.size == ready.size
    assert (Tree.of(content).digest, Tree.of(content).levels[0]) == (trained.digest, trained.leaves)
    result = await two.merge(1.0, [(trained.digest, tmp_path / "0" / trained.digest.hex(), 2.0)])
    assert (result.kept, result.used, result.faults) == (True, (trained.digest,), ())
    assert (tmp_path / "1" / result.digest.hex()).stat().st_size == result.size
    evaluation = await two.evaluate()
    assert evaluation.samples == 360
    assert evaluation.alone_accuracy is None


async def test_a_saved_model_is_taken_up_again(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer, saved = new_trainer("digits"), tmp_path / "model.safetensors"
    await trainer.start()
    trained = await trainer.train(25)
    await trainer.train(5)
    await trainer.save(saved, {"age": "25"})
    with pytest.raises(ConfigError, match="give a path that can be written"):
        await trainer.save(tmp_path / "nowhere" / "model.safetensors", {})
    evaluation = await trainer.evaluate()
    await trainer.stop()
    with safe_open(saved, framework="pt") as stored:
        assert stored.metadata()["age"] == "25"
        assert stored.metadata()["steps"] == "30"
    assert [name for name in os.listdir(tmp_path) if "model" in name] == ["model.safetensors"]
    again = new_trainer("digits", "again", resume=saved, init_seed=8)
    ready = await again.start()
    assert ready.steps == 30
    assert ready.digest != trained.digest
    assert (await again.evaluate()).test_loss == evaluation.test_loss


async def test_a_killed_child_is_replaced_and_nothing_is_lost(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer("slow")
    await trainer.start()
    training = asyncio.create_task(trainer.train(20))
    await told(tmp_path)
    os.kill(pid_of(trainer), signal.SIGKILL)  # in the middle of a request
    await told(tmp_path)  # the next child is at it
    first = await training
    assert first.steps == 20
    before = await trainer.evaluate()
    pid = pid_of(trainer)
    os.kill(pid, signal.SIGKILL)  # at rest
    after = await trainer.evaluate()
    assert pid_of(trainer) != pid
    assert not exists(pid)
    assert (after.test_loss, after.test_accuracy) == (before.test_loss, before.test_accuracy)
    await trainer.save(tmp_path / "model.safetensors", {})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        assert stored.metadata()["steps"] == "20"


async def test_a_crash_now_and_then_is_not_seen(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer("dies_once")
    result = await trainer.train(3)  # starts by itself
    assert result.steps == 3
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize(
    ("task", "says"), [("always_exits", "exit status 3"), ("always_raises", r"user_task.py(?s:.*)RuntimeError: no luck today")]
)
async def test_crash_after_crash_is_an_error_with_the_reason(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch, task: str, says: str
) -> None:
    monkeypatch.setattr(p2pnode.trainer, "CRASHES_MAX", 2)
    trainer = new_trainer(task)
    ready = await trainer.start()
    with pytest.raises(TrainerError, match=f"crashed 2 times in a row(?s:.*){says}"):
        await trainer.train(1)
    if task == "always_raises":
        assert (await trainer.start()).digest == ready.digest  # still of use
        assert (await trainer.evaluate()).samples == 64


async def test_a_bad_task_is_one_sentence(new_trainer: NewTrainer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"user_task.py, line \d+: NameError: name 'undefined_name'") as error:
        await new_trainer("bad").start()
    assert "\n" not in str(error.value)
    trainer = new_trainer("missing")
    with pytest.raises(ConfigError, match="has no 'missing'"):
        await trainer.start()
    assert trainer.pid is None


async def test_ctrl_c_is_the_parents_business(new_trainer: NewTrainer) -> None:
    trainer = new_trainer("quick")
    await trainer.start()
    pid = pid_of(trainer)
    os.kill(pid, signal.SIGINT)
    assert (await trainer.train(5)).steps == 5
    assert pid_of(trainer) == pid
    assert os.getsid(pid) != os.getsid(0)  # the terminal's Ctrl-C doesn't reach it either


async def test_a_cancelled_caller_leaves_the_trainer_usable(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer("slow")
    await trainer.start()
    training = asyncio.create_task(trainer.train(20))
    await told(tmp_path)
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert (await trainer.train(2)).steps == 2
    await trainer.save(tmp_path / "model.safetensors", {})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        assert stored.metadata()["steps"] == "22"  # what was begun was finished


async def test_stop_interrupts_a_long_step(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer("endless")
    await trainer.start()
    training = asyncio.create_task(trainer.train(1))
    await told(tmp_path)
    pid, began = pid_of(trainer), time.monotonic()
    await trainer.stop()
    assert time.monotonic() - began < 3
    assert not exists(pid)
    with pytest.raises(TrainerError, match="stopped"):
        await training
    with pytest.raises(TrainerError, match="stopped"):
        await trainer.evaluate()
    await trainer.stop()


async def test_stop_while_starting(new_trainer: NewTrainer) -> None:
    trainer = new_trainer("quick")
    starting = asyncio.create_task(trainer.start())
    await asyncio.sleep(0)
    await trainer.stop()
    with pytest.raises(TrainerError, match="stopped"):
        await starting
    assert trainer.pid is None


async def test_the_end_of_the_socket_ends_the_child_in_a_long_step(new_trainer: NewTrainer, tmp_path: Path) -> None:
    """What tells the child where the system has no death signal of the parent."""
    trainer = new_trainer("endless")
    await trainer.start()
    training = asyncio.create_task(trainer.train(1))
    await told(tmp_path)
    child = trainer._child
    assert child is not None
    trainer._stopped = True  # else a new child takes over
    child.writer.transport.abort()
    assert await asyncio.wait_for(child.process.wait(), 2) == 0
    with pytest.raises(TrainerError):
        await training


PROGRAM = """
import asyncio, sys
from pathlib import Path
from p2pnode.trainer import Trainer, TrainerSettings

def make_task(shard): ...

async def main():
    trainer = Trainer(TrainerSettings(sys.argv[1]), Path(sys.argv[2]))
    await trainer.start()
    print(trainer.pid, flush=True)
    await trainer.train(1)

"""


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "user_task.py").write_text(TASKS)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "program.py").write_text(PROGRAM + "asyncio.run(main())\n")
    command = [sys.executable, tmp_path / "program.py", f"{tmp_path}/user_task.py:endless", tmp_path / "blobs"]
    environment = {**os.environ, "PYTHONPATH": "."}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())  # nothing else was printed there
        (tmp_path / "fifo").read_bytes()
        watch = os.pidfd_open(pid)
        parent.kill()
        ended, _, _ = select.select([watch], [], [], 2)
        os.close(watch)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    assert ended


def test_a_program_that_starts_itself_again_is_told(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM + "asyncio.run(main())\n")
    command = [sys.executable, file, f"{file}:make_task", tmp_path / "blobs"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "put that part under if __name__ == '__main__'" in done.stderr
