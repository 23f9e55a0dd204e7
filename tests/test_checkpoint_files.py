"""Whole checkpoints: who goes on from one does what he would have done anyway, to the bit; a bad one loads nothing."""

from __future__ import annotations

import json
import os
import random
import threading
from hashlib import sha256
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from p2pnode.checkpoint_files import UnwritableError, packed, unpacked
from p2pnode.errors import ConfigError
from p2pnode.learner import Learner
from p2pnode.tasks.samples import shuffled
from p2pnode.tensor_files import extract, read_header
from p2pnode.trainer_results import TrainerSettings
from protocols import tensors
from protocols.entries import Span
from protocols.identity import PeerId
from tests.tally import tally

TASKS = ("digits", *(f"tests.checkpoint_tasks:{name}" for name in ("sgd", "adam", "adamw", "lbfgs", "bfloat", "augmented")))
CUTS = int(os.environ.get("P2PNODE_CHECKPOINT_CUTS", "30"))
ME, OTHER = PeerId(b"m" * 32), PeerId(b"o" * 32)


def learner(folder: Path, task: str, resume: Path | None = None, **more: object) -> Learner:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    chosen = {"init_seed": 7, "swarm": bytes(16), "author": ME, **more}
    return Learner(TrainerSettings(task, resume=resume, **chosen), folder / "blobs", None)  # type: ignore[arg-type]


def scramble(seed: int = 0) -> None:
    """What another process would be like."""
    for draw in (torch.manual_seed, np.random.seed, random.seed):
        draw(seed)  # type: ignore[operator]


def everything(node: Learner) -> dict[str, object]:
    """All that the next step depends on, as bytes where it can be."""
    found: dict[str, object] = {"steps": node.pupil.steps}
    for name, pupil in (("own", node.pupil), ("alone", node.alone)):
        if pupil is None:
            continue
        for key, value in tensors.state_of(pupil.model).items():
            found[f"{name} {key}"] = raw(value)
        held: dict[str, torch.Tensor] = {}
        found[f"{name} order"] = pupil.order.position()
        found[f"{name} optimizer"] = json.dumps(packed(pupil.optimizer.state_dict(), "t", held))
        found |= {f"{name} {key}": raw(value) for key, value in held.items()}
    found["torch"] = raw(torch.get_rng_state())
    found["numpy"], found["python"] = str(np.random.get_state()), random.getstate()
    found["shard"] = node.shard.rng.bit_generator.state
    if node.scalars is not None:
        found["sum"], found["counts"] = node.scalars.model.digest, dict(node.scalars.model.counts)
    return found


def raw(value: torch.Tensor) -> bytes:
    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def act(node: Learner, plan: list[int], peer: Path) -> None:
    """Local steps, as many as a number says; 0: a merge."""
    for steps in plan:
        if steps:
            node.train(steps)
        else:
            node.merge(2.0, [(node.tree.digest, peer, 1.0)])


plans = st.lists(st.integers(0, 4), min_size=2, max_size=6)
numbers = count()


@settings(max_examples=CUTS, deadline=None, database=None, derandomize=True, phases=(Phase.generate,))  # failures are small
@given(task=st.sampled_from(TASKS), before=plans, after=plans, alone=st.booleans())
def test_going_on_from_a_checkpoint_is_not_having_stopped(
    tmp_path_factory: pytest.TempPathFactory, task: str, before: list[int], after: list[int], alone: bool
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    peer = folder / "peer"
    scramble()
    other = learner(folder / "other", task, shard_index=1, shard_count=2)
    peer.write_bytes(tensors.encode(other.schema, tensors.state_of(other.pupil.model)))
    common = {"measure_alone": alone, "shard_count": 2}
    straight = learner(folder / "straight", task, **common)
    act(straight, before, peer)
    straight.evaluate()  # the copy that stays alone catches up
    state = straight.shard.rng.bit_generator.state
    straight.checkpoint(folder / "c.safetensors", {})
    assert straight.shard.rng.bit_generator.state == state, "a checkpoint changes nothing"
    again_generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    act(straight, after, peer)
    straight.evaluate()
    expected = everything(straight)
    scramble(1)
    again = learner(folder / "again", task, folder / "c.safetensors", **common)
    assert torch.equal(torch.get_rng_state(), again_generators[0])
    act(again, after, peer)
    again.evaluate()
    found = everything(again)
    wrong = [key for key in expected if expected[key] != found.get(key)]
    tally("a cut anywhere, and the same bits afterwards", bool(wrong), 1)
    assert not wrong
    assert again.remarks == []


@pytest.mark.parametrize("protocol", ["scalars", "both"])
def test_so_it_is_with_scalars(tmp_path: Path, protocol: str) -> None:
    """Both halves of a combined node, its order of mini-batches included."""
    foreign = Span(OTHER, 0, bytes(i % 127 + 1 for i in range(90)))

    def second_half(node: Learner) -> None:
        assert node.scalars is not None
        node.scalars.apply([foreign], [])
        said = node.scalars.model.counts[ME]
        for _ in range(3):
            if protocol == "both":
                node.train(3)
            node.probe(said, 4)
            said += 4

    straight = learner(tmp_path / "straight", "tests.checkpoint_tasks:sgd", protocol=protocol)
    assert straight.scalars is not None
    straight.scalars.restore(None, {})
    codes = straight.probe(0, 6).codes
    if protocol == "both":
        straight.train(5)
    straight.checkpoint(tmp_path / "c.safetensors", {})
    second_half(straight)
    expected = everything(straight)
    scramble(1)
    again = learner(tmp_path / "again", "tests.checkpoint_tasks:sgd", tmp_path / "c.safetensors", protocol=protocol)
    assert again.scalars is not None
    again.scalars.restore(None, {})
    again.scalars.apply([Span(ME, 0, codes)], [])
    second_half(again)
    found = everything(again)
    assert [key for key in expected if expected[key] != found.get(key)] == []


def test_what_is_in_the_file_and_what_it_says_of_itself(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.checkpoint_tasks:adam", measure_alone=True)
    node.train(7)
    node.evaluate()
    path = tmp_path / "00000001.safetensors"
    result = node.checkpoint(path, {"sequence": "5", "age": "9"})
    data = path.read_bytes()
    assert (result.sha256, result.size, result.steps, result.remarks) == (sha256(data).digest(), len(data), 7, ())
    assert result.seconds > 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert (metadata["sequence"], metadata["age"], metadata["steps"]) == ("5", "9", "7")
    assert metadata["schema"] == node.schema.digest.hex()
    assert {f"model.{spec.name}" for spec in node.schema.tensors} <= names
    assert {"rng.torch", "rng.numpy", "rng.python"} <= names
    assert len([name for name in names if name.startswith("optimizer.")]) == 4 * 6  # step and three moments of six parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001.safetensors", "blobs"]
    stored = load_file(path)
    assert all(torch.equal(stored[f"model.{name}"], value) for name, value in tensors.state_of(node.pupil.model).items())


def test_a_model_is_taken_out_of_a_checkpoint(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.checkpoint_tasks:bfloat")
    node.train(3)
    node.checkpoint(tmp_path / "c.safetensors", {})
    size = extract(tmp_path / "c.safetensors", "model.", tmp_path / "m.safetensors", {"age": "3"})
    assert size == (tmp_path / "m.safetensors").stat().st_size
    model = tensors.state_of(node.pupil.model)
    stored = load_file(tmp_path / "m.safetensors")
    assert stored.keys() == model.keys()
    assert all(torch.equal(stored[name], value) for name, value in model.items())
    assert read_header(tmp_path / "m.safetensors").metadata == {"age": "3"}
    with pytest.raises(ValueError, match="no 'nothing"):
        extract(tmp_path / "c.safetensors", "nothing.", tmp_path / "n.safetensors", {})


def test_a_bad_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.checkpoint_tasks:adam")
    node.train(3)
    path = tmp_path / "c.safetensors"
    node.checkpoint(path, {})
    good = path.read_bytes()
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    state = json.loads(header["__metadata__"]["state"])

    def with_state(change: dict[str, object]) -> bytes:
        header["__metadata__"]["state"] = json.dumps({**state, **change})
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + good[8 + int.from_bytes(good[:8], "little") :]

    for damaged in (
        b"",
        good[:7],
        good[:-1],
        good + b"\0",
        b"\xff" * 64,
        good[: len(good) // 2],
        with_state({"pupil": None}),
        with_state({"pupil": {**state["pupil"], "steps": "many"}}),
        with_state({"pupil": {**state["pupil"], "order": {"count": 45, "size": 8, "rng": {}, "at": 8}}}),
        with_state({"generators": {}}),
        with_state({"generators": {**state["generators"], "numpy": ["PCG", 0, 0, 0.0]}}),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"c\.safetensors can't be read: .*; move it away") as caught:
            learner(tmp_path / "again", "tests.checkpoint_tasks:adam", path)
        assert "\n" not in str(caught.value)
    path.write_bytes(good)
    with pytest.raises(ConfigError, match="isn't of task 'digits'"):
        learner(tmp_path / "again", "digits", path)
    assert learner(tmp_path / "again", "tests.checkpoint_tasks:adam", path).pupil.steps == 3


def test_an_optimizer_that_can_t_be_written_begins_anew_and_says_so(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.checkpoint_tasks:secretive")
    node.train(3)
    result = node.checkpoint(tmp_path / "c.safetensors", {})
    assert result.remarks == ("the optimizer's state can't be kept (it holds a object): after a restart it begins anew",)
    again = learner(tmp_path / "again", "tests.checkpoint_tasks:secretive", tmp_path / "c.safetensors")
    assert again.pupil.steps == 3
    assert again.tree.digest == node.tree.digest
    assert not again.pupil.optimizer.state


def test_a_changed_task_counts_for_more_than_the_checkpoint(tmp_path: Path) -> None:
    """A learning rate that a person has edited is used; an optimizer of another kind begins anew."""
    node = learner(tmp_path, "tests.checkpoint_tasks:sgd")
    node.train(3)
    node.pupil.optimizer.param_groups[0]["momentum"] = 0.7  # as a schedule does while it runs
    node.checkpoint(tmp_path / "c.safetensors", {})
    slower = learner(tmp_path / "a", "tests.checkpoint_tasks:slower_sgd", tmp_path / "c.safetensors")
    group = slower.pupil.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], len(slower.pupil.optimizer.state)) == (0.01, 0.7, 6)
    adam = learner(tmp_path / "d", "tests.checkpoint_tasks:adam")
    adam.train(2)
    adam.pupil.optimizer.param_groups[0]["lr"] = 0.5
    adam.checkpoint(tmp_path / "e.safetensors", {})
    changed = learner(tmp_path / "f", "tests.checkpoint_tasks:adam_with_other_betas", tmp_path / "e.safetensors")
    group = changed.pupil.optimizer.param_groups[0]
    assert (group["betas"], group["lr"], changed.remarks) == ((0.5, 0.9), 0.5, [])
    other = learner(tmp_path / "b", "tests.checkpoint_tasks:adam", tmp_path / "c.safetensors")
    assert other.remarks == ["the task has another optimizer than before (torch.optim.sgd.SGD): it begins anew"]
    assert (other.pupil.steps, len(other.pupil.optimizer.state)) == (3, 0)


def test_a_model_file_of_before_there_were_checkpoints_is_taken_up(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.checkpoint_tasks:bfloat")
    node.train(4)
    node.save(tmp_path / "model.safetensors", {"age": "4"})
    again = learner(tmp_path / "again", "tests.checkpoint_tasks:bfloat", tmp_path / "model.safetensors")
    assert (again.pupil.steps, again.tree.digest) == (4, node.tree.digest)


def test_values_survive_as_json() -> None:
    held: dict[str, torch.Tensor] = {}
    value = {
        0: {"step": torch.tensor(3.0), "al": [None, torch.ones(2), 0.1 + 0.2]},
        "betas": (0.9, 1e-300, float("inf")),
        "on": True,
    }
    tree = json.loads(json.dumps(packed(value, "t", held)))
    found = unpacked(tree, held.__getitem__)
    assert str(found) == str(value)
    for strange in ({1, 2}, object(), torch.ones(2).to_sparse(), np.float64(1), lambda: 0):
        with pytest.raises(UnwritableError):
            packed([strange], "t", {})
    for wrong in (["set", 1], [], {"a": 1}, [["tensor"]]):
        with pytest.raises(ValueError, match="unknown value"):
            unpacked(wrong, held.__getitem__)


@given(size=st.integers(1, 9), total=st.integers(1, 20), taken=st.integers(0, 30))
@settings(max_examples=50, deadline=None, database=None)
def test_an_order_of_samples_goes_on_where_it_was(size: int, total: int, taken: int) -> None:
    one = shuffled(total, size, np.random.default_rng(4))
    for _ in range(taken):
        next(one)
    position = json.loads(json.dumps(one.position()))
    other = shuffled(total, size, np.random.default_rng(99))
    assert other.go_to(position)
    assert [next(one).tolist() for _ in range(9)] == [next(other).tolist() for _ in range(9)]
    assert not shuffled(total + 1, size, np.random.default_rng(4)).go_to(position), "the data is another"


def test_a_restarted_process_takes_the_newest_model_and_the_checkpoint_s_optimizer(tmp_path: Path) -> None:
    node = learner(tmp_path, "tests.checkpoint_tasks:adam")
    node.train(5)
    path = tmp_path / "c.safetensors"
    node.checkpoint(path, {})
    moments = {key: raw(value["exp_avg"]) for key, value in node.pupil.optimizer.state_dict()["state"].items()}
    node.train(4)
    blob = node.blobs / node.tree.digest.hex()
    asked = TrainerSettings("tests.checkpoint_tasks:adam", init_seed=7, resume=path)
    again = Learner(asked, node.blobs, (blob, 9), threading.Event())
    assert (again.pupil.steps, again.tree.digest, again.remarks) == (9, node.tree.digest, [])
    assert {key: raw(value["exp_avg"]) for key, value in again.pupil.optimizer.state_dict()["state"].items()} == moments
    assert again.pupil.order.position() == node.pupil.order.position(), "no sample comes twice"
    good = path.read_bytes()
    state = good.replace(b'\\"steps\\":5', b'\\"stepz\\":5')
    assert state != good
    path.write_bytes(state)
    assert "can't be read" in Learner(asked, node.blobs, (blob, 9), threading.Event()).remarks[0]
    path.write_bytes(b"junk")
    third = Learner(asked, node.blobs, (blob, 9), threading.Event())
    assert (third.pupil.steps, third.tree.digest) == (9, node.tree.digest)
    assert "can't be read" in third.remarks[0]
