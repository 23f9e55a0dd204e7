"""`p2pnode demo`: real daemons on this machine learn together, and the demo says whether they did.

Owns the nodes' start, watch and end, and the document; what must come true is `demo_promises.py`'s. The daemons are what
`p2pnode run` is; the demo only starts them (the first is the others' bootstrap), asks for their status and stops them. Never
leaves a process or, unless asked, a file behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.demo_nodes import DaemonEnded, DemoNode, kill_now, stop
from cli.demo_promises import LOSS_MARGIN, LOSS_MARGINS, TARGET_ACCURACY, TARGETS, ModelsPromise, Promise, ScalarsPromise
from cli.demo_table import Watch
from cli.exit_status import ExitStatus
from cli.render import Screen
from p2pnode.config import MODELS, SCALARS, Config
from p2pnode.errors import ConfigError
from p2pnode.keyring import found_ahead

POLL_S = 0.5  # between two looks at the nodes; a person can't read faster
NODES_MAX = 64  # processes with a torch each; more belongs into `p2pnode simulate`
CYCLE_S = 0.25  # people are watching: twice the daemon's pace
EVALUATE_EVERY_S = 1.0  # the demo ends as soon as the target is reached, so it looks often
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    nodes: int
    seconds: float
    task: str
    alpha: float
    seed: int
    protocol: str
    promise: Promise

    def config(self, index: int, folder: Path) -> Config:
        """Node `index`'s config, from 0. Raises ConfigError."""
        from p2pnode.task import spec_of

        return Config(
            swarm=f"demo-{self.seed}",
            name=f"node{index + 1}",
            data_dir=folder / f"node{index + 1}",
            task=spec_of(self.task),
            listen=("/ip4/127.0.0.1/tcp/0",),
            mdns=False,
            upnp=False,
            shard_index=index,
            shard_count=self.nodes,
            shard_seed=self.seed,
            alpha=self.alpha,
            threads=max(1, (os.cpu_count() or 1) // self.nodes),
            cycle_s=CYCLE_S,
            evaluate_every_s=EVALUATE_EVERY_S,
            **self.promise.settings,
        )


def register(app: typer.Typer) -> None:
    """Add the verb to `app`."""
    app.command()(demo)


def demo(
    nodes: Annotated[int, typer.Option(min=2, max=NODES_MAX, help="How many daemons.")] = 4,
    seconds: Annotated[float, typer.Option(min=1, max=86_400, help="Give up after this time.")] = 120,
    target_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Test accuracy that every node must reach: 0.93, fashion-mnist 0.75.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="digits, fashion-mnist, mnist, sentiment, module:function or path.py:function.")
    ] = "digits",
    alpha: Annotated[float, typer.Option(min=0, help="Dirichlet concentration of labels: 0.3 is far from IID, 0 IID.")] = 0.3,
    seed: Annotated[int, typer.Option(min=0, help="Of the split of the data and the common start.")] = 0,
    protocol: Annotated[str, typer.Option(help="What they exchange: models, or scalars, a byte a gradient.")] = MODELS,
    merge: Annotated[str, typer.Option(help="Merge rule: Adaptive, VarianceCorrected or FedAvg.")] = "Adaptive",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep the nodes' data folders here.", metavar="DIR")] = None,
) -> None:
    """Real daemons on this machine learn together; watch them.

    Each is a process of its own with its own identity, data and training process, and all talk libp2p over loopback. Exit
    status 0 only if every node reached the target by exchanging models; with scalars, if all ended with the same bits and a test
    loss that fell by the margin that the demo states.
    """
    plan = Plan(nodes, seconds, task, alpha, seed, protocol, _promise(protocol, task, merge, target_accuracy))
    screen = Screen(as_json)
    document, status = asyncio.run(_run(plan, screen, keep))
    if as_json:
        screen.document(document)
    raise typer.Exit(status)


def _promise(protocol: str, task: str, merge: str, target: float | None) -> Promise:
    """Raises ConfigError when it makes no sense."""
    if protocol == SCALARS:
        if target is not None:
            raise ConfigError("with --protocol scalars the demo looks at the test loss; leave out --target-accuracy")
        return ScalarsPromise(task, LOSS_MARGINS.get(task, LOSS_MARGIN))
    if protocol != MODELS:
        raise ConfigError(f"--protocol is '{protocol}'; the demo shows {MODELS} or {SCALARS}")
    return ModelsPromise(task, merge, TARGETS.get(task, TARGET_ACCURACY) if target is None else target)


async def _run(plan: Plan, screen: Screen, keep: Path | None) -> tuple[dict[str, Any], ExitStatus]:
    """Start the nodes, watch them to the end, stop them. Returns the demo's document and how it ended."""
    began = time.monotonic()
    failure = None
    with _folder(keep) as folder:
        team = [DemoNode(plan.config(index, folder)) for index in range(plan.nodes)]
        learning = asyncio.create_task(_learn(plan, screen, team, began))
        _obey_signals(learning, team, screen)
        try:
            await learning
        except DaemonEnded as error:
            failure = str(error)
        except asyncio.CancelledError:
            failure = INTERRUPTED
        finally:
            killed = await stop(team)
        document = _document(plan, team, time.monotonic() - began, failure)
        if keep:
            document["data_dirs"] = [str(node.config.data_dir) for node in team]
    if killed:
        screen.talk(f"had to kill {', '.join(killed)}, which did not stop in time")
    screen.talk(failure or plan.promise.verdict(team, document["seconds"], plan.seconds))
    if failure == INTERRUPTED:
        return document, ExitStatus.INTERRUPTED
    return document, ExitStatus.OK if document["ok"] else ExitStatus.FAILED


def _obey_signals(learning: asyncio.Task[None], team: Sequence[DemoNode], screen: Screen) -> None:
    """Ctrl-C, SIGTERM or a closed terminal stop the nodes in order; a second one kills them, for somebody who can't wait."""

    def interrupt() -> None:
        if learning.done() or learning.cancelling():
            kill_now(team)
        else:
            screen.talk("stopping the nodes")
            learning.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)


async def _learn(plan: Plan, screen: Screen, team: Sequence[DemoNode], began: float) -> None:
    """Until there is nothing left to see or the time is over. Raises DaemonEnded or ConfigError."""
    starting = asyncio.create_task(start(team))
    try:
        with Watch(screen, f"{plan.nodes} nodes {plan.promise.headline}", plan.promise.view) as watch:
            while True:
                seconds = time.monotonic() - began
                over = seconds >= plan.seconds or plan.promise.done(team)
                watch.show(seconds, {node.config.name: node.status for node in team}, last=over)
                if over:
                    return
                await _next_look(starting, team, min(POLL_S, plan.seconds - seconds))
                await plan.promise.lead(team, seconds, plan.seconds)
                await asyncio.gather(*(node.refresh() for node in team))
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _next_look(starting: asyncio.Task[None], team: Sequence[DemoNode], seconds: float) -> None:
    """Wait `seconds`, less when a daemon ends, which is then raised as DaemonEnded or ConfigError."""
    was_starting = not starting.done()
    awaited = [starting] * was_starting + [node.ended for node in team if node.ended]
    await asyncio.wait(awaited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for node in team:
        node.check()
    if was_starting and starting.done():
        starting.result()


async def start(team: Sequence[DemoNode]) -> None:
    """All at once, because importing torch takes longest. The first node's invitation and address are all the others get."""
    first, *others = team
    invitation = found_ahead(first.config.data_dir, first.config.swarm)
    try:
        async with asyncio.TaskGroup() as group:
            bootstrap = group.create_task(first.start())
            for node in others:
                group.create_task(_start_and_join(node, invitation, bootstrap))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _start_and_join(node: DemoNode, invitation: str, bootstrap: asyncio.Task[str]) -> None:
    await node.start(invitation)
    await node.join(await bootstrap)


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder of the nodes' data folders: temporary, or the user's. Raises ConfigError when it can't be used."""
    try:
        if keep is None:
            folder = Path(tempfile.mkdtemp(prefix="p2pnode-demo-"))
        else:
            folder = keep.absolute()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"can't write to {keep or tempfile.gettempdir()} ({error.strerror}); choose another --keep") from None
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _document(plan: Plan, team: Sequence[DemoNode], seconds: float, failure: str | None) -> dict[str, Any]:
    """The demo's answer; a figure that never came is null."""
    nodes = [
        {"name": node.config.name, **{key: _rounded(node.status.get(key)) for key in plan.promise.node_keys}} for node in team
    ]
    document: dict[str, Any] = {
        "ok": failure is None and plan.promise.kept(team),
        "seconds": round(seconds, 1),
        "task": plan.task,
        "alpha": plan.alpha,
        "seed": plan.seed,
        "protocol": plan.protocol,
        **{key: _rounded(value) for key, value in plan.promise.facts(team).items()},
        "nodes": nodes,
    }
    return document if failure is None else {**document, "error": failure}


def _rounded(value: Any) -> Any:
    """Six digits: what a float32 knows."""
    return round(value, 6) if isinstance(value, float) else value
