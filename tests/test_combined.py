"""Models and scalars at once: merging leaves the sum alone, probing leaves the models alone."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

from p2pnode.trainer import Trainer, TrainerSettings
from protocols.entries import Span
from protocols.merkle import Digest, Tree
from tests.scalar_nodes import AUTHORS, SWARM, full, learner, of, state


def test_combined_mode_trains_merges_and_probes(tmp_path: Path) -> None:
    """Local models and a common sum: merging leaves the sum alone, probing the models, and a restart finds both."""
    nodes = [
        learner(
            tmp_path / str(i),
            author=AUTHORS[i],
            shard_index=i,
            shard_count=2,
            protocol="both",
            merge="FedAvg",
            merge_tolerance=9.0,
        )
        for i in range(2)
    ]
    said = [b"", b""]
    for _ in range(12):
        for i, node in enumerate(nodes):
            node.train(5)
            before = of(node).model.digest
            said[i] += node.probe(len(said[i]), 5).codes
            assert of(node).model.digest != before
        for i, node in enumerate(nodes):
            of(node).apply([Span(AUTHORS[1 - i], 0, said[1 - i])], [])
            other = nodes[1 - i]
            result = node.merge(1.0, [(other.tree.digest, other.blobs / other.tree.digest.hex(), 1.0)])
            assert result.kept
            assert Tree.of((node.blobs / result.digest.hex()).read_bytes()).digest == result.digest
    assert of(nodes[0]).model.digest == of(nodes[1]).model.digest
    assert min(node.evaluate().test_accuracy or 0 for node in nodes) > 0.8
    node = nodes[0]
    merged = node.merge(1.0, [(node.tree.digest, node.blobs / node.tree.digest.hex(), 1.0)])
    assert merged.digest == node.tree.digest == nodes[0].tree.digest  # equal models stay what they are, to the bit
    node.checkpoint(tmp_path / "0" / "model.safetensors", {})
    before, kept = state(node), node.tree.digest
    again = learner(
        tmp_path / "0", author=AUTHORS[0], shard_count=2, protocol="both", resume=tmp_path / "0" / "model.safetensors"
    )
    assert of(again).restore(None, {AUTHORS[i]: len(said[i]) for i in range(2)}).warnings == ()
    assert again.tree.digest == kept
    assert again.pupil.steps == 60
    assert state(again) == before


def test_combined_mode_goes_back_from_a_bad_merge_and_from_divergence(tmp_path: Path) -> None:
    node = full(tmp_path, protocol="both")
    before, model = state(node), node.tree.digest
    broken = {name: value * -50 + 3 for name, value in node.pupil.model.state_dict().items()}
    path = tmp_path / "broken"
    path.write_bytes(b"".join(value.numpy().tobytes().ljust(-(-value.nbytes // 8) * 8, b"\0") for value in broken.values()))
    result = node.merge(1.0, [(Digest(bytes(32)), path, 1000.0)])
    assert (result.kept, result.digest, result.faults) == (False, model, ())
    assert state(node) == before
    node.pupil.optimizer.param_groups[0]["lr"] = float("inf")
    assert math.isnan(node.train(3).loss)
    assert (state(node), node.tree.digest) == (before, model)


async def test_a_killed_process_has_both_again(tmp_path: Path) -> None:
    settings = TrainerSettings("tests.small_task:make_task", init_seed=7, protocol="both", swarm=SWARM, author=AUTHORS[0])
    trainer = Trainer(settings, tmp_path / "blobs")
    spans: list[Span] = []
    try:
        await trainer.start()
        await trainer.restore(lambda: (None, tuple(spans)))
        trained = await trainer.train(5)
        spans.append(Span(AUTHORS[0], 0, (await trainer.probe(0, 5)).codes))
        before, tested = await trainer.fingerprint(), await trainer.evaluate()
        assert trainer.pid is not None
        os.kill(trainer.pid, signal.SIGKILL)
        assert await trainer.fingerprint() == before
        assert (await trainer.evaluate()).test_loss == tested.test_loss
        assert (
            await trainer.merge(1.0, [(trained.digest, tmp_path / "blobs" / trained.digest.hex(), 1.0)])
        ).digest == trained.digest
    finally:
        await trainer.stop()
