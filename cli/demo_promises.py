"""What a demo must show before it may say `ok`: one promise for models, one for scalars.

Owns when a demo has seen enough, what its nodes must have reached, and the sentence it ends with. Never starts or stops a node:
that is `demo.py`'s. A figure that a node hasn't told yet is missing, never guessed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Protocol

from cli import demo_table
from cli.demo_nodes import ASK_S_MAX, DemoNode
from cli.render import number, percent
from p2pnode.config import SCALARS
from p2pnode.control import ControlError, NotRunning, ask_async

TARGET_ACCURACY = 0.93  # digits and mnist: every node gets there by exchanging, none alone (`p2pnode demo`)
TARGETS = {"fashion-mnist": 0.75}  # alone 0.56 to 0.65 (`p2pnode demo --task fashion-mnist`)

LOSS_MARGIN = 0.05  # of a task that we don't know
LOSS_MARGINS = {"digits": 1.0}  # from 2.3, which is guessing
ENOUGH = 1.2  # times the margin, on the way: then the last entries can't take it back
SETTLE_S_MAX = 20.0  # from the last probe until all have the same: a few exchanges between processes, on a loaded machine

NODE_KEYS = (
    *("pid", "peer_id", "peers", "age", "steps", "merges", "bytes_sent", "bytes_received"),
    *("test_loss", "test_accuracy", "alone_accuracy"),
)

Team = Sequence[DemoNode]


class Promise(Protocol):
    """What is shown, when it is over, and whether it was kept."""

    view: ClassVar[demo_table.View]
    node_keys: ClassVar[tuple[str, ...]]  # of a node's status, in the demo's document

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of the nodes' configs."""
        ...

    @property
    def headline(self) -> str:
        """What a person is about to see."""
        ...

    async def lead(self, team: Team, seconds: float, seconds_max: float) -> None:
        """Tell the nodes what to do next, so many seconds after the start; at the most the demo gives up."""
        ...

    def done(self, team: Team) -> bool:
        """Whether there is nothing left to see."""
        ...

    def kept(self, team: Team) -> bool:
        """Whether all came true."""
        ...

    def facts(self, team: Team) -> dict[str, Any]:
        """Figures of the whole team, for the document."""
        ...

    def verdict(self, team: Team, seconds: float, seconds_max: float) -> str:
        """The last sentence a person reads."""
        ...


@dataclass(frozen=True, slots=True)
class ModelsPromise:
    """Every node reaches the target accuracy by exchanging models, though its own data alone would not do."""

    task: str
    merge: str
    target: float

    view: ClassVar[demo_table.View] = demo_table.MODELS
    node_keys: ClassVar[tuple[str, ...]] = NODE_KEYS

    @property
    def settings(self) -> dict[str, Any]:
        return {"merge": self.merge, "measure_alone": True}

    @property
    def headline(self) -> str:
        return f"learn {self.task} together; target {percent(self.target)}"

    async def lead(self, team: Team, seconds: float, seconds_max: float) -> None:
        """They find their way."""

    def done(self, team: Team) -> bool:
        """The target is reached, and what each would be alone is known."""
        return self.kept(team) and all(node.status.get("alone_accuracy") is not None for node in team)

    def kept(self, team: Team) -> bool:
        return not self._short(team)

    def _short(self, team: Team) -> list[str]:
        """Who isn't where it should be, or didn't get there by exchanging."""
        reached = [(node.status.get("test_accuracy") or 0.0) >= self.target and node.status.get("merges") for node in team]
        return [node.config.name for node, there in zip(team, reached, strict=True) if not there]

    def facts(self, team: Team) -> dict[str, Any]:
        return {"merge": self.merge, "target_accuracy": self.target}

    def verdict(self, team: Team, seconds: float, seconds_max: float) -> str:
        if short := self._short(team):
            return f"{', '.join(short)} did not reach {percent(self.target)} by exchanging within {seconds_max:.0f} s"
        alone = [node.status["alone_accuracy"] for node in team if node.status.get("alone_accuracy") is not None]
        without = (
            f"; alone, on its own data, the best has {percent(max(alone))}, the worst {percent(min(alone))}" if alone else ""
        )
        return f"all {len(team)} nodes reached {percent(self.target)} in {seconds:.0f} s by exchanging{without}"


@dataclass(frozen=True, slots=True)
class ScalarsPromise:
    """All nodes end with the same bits, and with a lower mean test loss than they began with, by `margin` at least."""

    task: str
    margin: float

    view: ClassVar[demo_table.View] = demo_table.SCALARS
    node_keys: ClassVar[tuple[str, ...]] = (*NODE_KEYS, "ledger_entries", "bytes_per_gradient", "state_digest")

    @property
    def settings(self) -> dict[str, Any]:
        return {"protocol": SCALARS}

    @property
    def headline(self) -> str:
        return f"learn {self.task} together, a byte a gradient; the test loss must fall by {number(self.margin, 2)}"

    async def lead(self, team: Team, seconds: float, seconds_max: float) -> None:
        """Once it has got better, or time runs out: measure nothing new, so that what is on its way arrives everywhere."""
        enough = self._gain(team) >= ENOUGH * self.margin
        if enough or seconds_max - seconds <= min(SETTLE_S_MAX, seconds_max / 2):
            await asyncio.gather(*(_pause(node) for node in team if not _scalars(node).get("paused")))

    def done(self, team: Team) -> bool:
        """All have stopped measuring, have what all others have, and have tested that."""
        quiet = all(_scalars(node).get(key) for node in team for key in ("paused", "settled", "tested"))
        return quiet and self._same(team)

    def kept(self, team: Team) -> bool:
        return self.done(team) and self._gain(team) >= self.margin

    @staticmethod
    def _same(team: Team) -> bool:
        return all(len({node.status.get(key) for node in team}) == 1 for key in ("state_digest", "ledger_digest"))

    @staticmethod
    def _losses(team: Team) -> tuple[float | None, float | None]:
        """Means over the nodes: at the start, and now."""
        said = [[loss for node in team if (loss := node.status.get(key)) is not None] for key in ("start_loss", "test_loss")]
        before, after = (fmean(losses) if len(losses) == len(team) else None for losses in said)
        return before, after

    def _gain(self, team: Team) -> float:
        before, after = self._losses(team)
        return float("-inf") if before is None or after is None else before - after

    def facts(self, team: Team) -> dict[str, Any]:
        before, after = self._losses(team)
        return {"start_loss": before, "end_loss": after, "loss_margin": self.margin, "digests_equal": self._same(team)}

    def verdict(self, team: Team, seconds: float, seconds_max: float) -> str:
        before, after = self._losses(team)
        losses = f"the mean test loss went from {number(before)} to {number(after)}"
        if not self.done(team):
            return f"the {len(team)} nodes did not come to the same state within {seconds_max:.0f} s; {losses}"
        entries, digest = team[0].status.get("ledger_entries"), team[0].status.get("state_digest")
        if not self.kept(team):
            return f"{losses}, and not down by {number(self.margin, 2)}, though all hold the same {entries} gradients"
        same = f"all {len(team)} nodes hold the same {entries} gradients and the same bits ({digest})"
        return f"{same} after {seconds:.0f} s; {losses}"


def _scalars(node: DemoNode) -> dict[str, Any]:
    """The part of a node's status that only this mode has."""
    return node.status.get("scalars") or {}


async def _pause(node: DemoNode) -> None:
    """A node that doesn't listen now is told again at the next look."""
    with contextlib.suppress(NotRunning, ControlError, TimeoutError):
        await ask_async(node.config.data_dir, {"do": "pause"}, ASK_S_MAX)
