"""What is simulated: one frozen dataclass, read from TOML, changed by `key=value`.

Owns the names, types and ranges of scenario keys (those of misfortune: `faults`). Flat on purpose, so that `--set merge=FedAvg`
needs no path; only the protocols' limits have a table of their own (`[limits]`, `--set limits.shuffle_s=5`). An unknown key is an
error that names the nearest key. It must never read anything but the one file it is asked for. Where a number may be "off", 0 is
off.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from protocols.gossip import GossipSettings
from protocols.limits import LAPTOP, Limits
from protocols.settings import ScalarSettings
from simulations import faults
from simulations.drawing import drawn
from simulations.errors import ScenarioError
from simulations.faults import Faults
from simulations.keys import check_range, nearest, one_of, typed, within

SHIPPED = Path(__file__).parent / "scenarios"
REGRESSIONS = SHIPPED / "regressions.toml"  # no scenario, but seeds of some

KEPT = ("heal_s", "grace_s", "repair")  # of the keys of misfortune, in a control run

TOPOLOGIES = ("overlay", "fully_connected", "ring", "k_regular", "erdos_renyi", "barabasi_albert")
PROTOCOLS = ("models", "scalars")
SHIFTS = ("", "rotated", "inverted")  # simulations/shifts.py


@dataclass(frozen=True, slots=True)
class Scenario(Faults):
    """One run. Times in virtual seconds; `seed` decides everything that is random."""

    name: str = "unnamed"
    seed: int = within(1, 0, 2**63 - 1)
    draw: str = one_of("", "swarm")  # swarm: each seed draws its own faults (simulations/drawing.py)
    nodes: int = within(20, 1, 5000)
    seconds: float = within(60.0, 0.001, 10_000_000)

    # what is learned
    task: str = "digits"
    alpha: float = within(0.0, 0, 1e6)  # Dirichlet concentration of label skew; 0: IID
    node_samples: int = within(0, 0, 10_000_000)  # each node learns from so many of its part of the data, at random; 0: from all
    same_init: bool = False  # True: everybody (of an island) starts from the same parameters
    hidden: tuple[int, ...] = ()  # widths of an MLP that replaces the task's model (Xavier-uniform, zero biases); (): task's own
    convolutional: bool = False  # True: a small CNN replaces the task's model, whose inputs are square images
    pretrain_steps: int = within(0, 0, 10_000_000)  # above 0: all start from one model, trained so long on all of the data
    pretrain_lr: float = within(0.05, 1e-9, 100)  # of SGD with momentum 0.9
    pretrain_batch: int = within(64, 1, 100_000)
    shift: str = one_of(*SHIFTS)  # of the nodes' and the test images, not of those pretrained on: rotated, inverted; "": none
    lr: float = within(0.0, 0, 100)  # above 0: SGD with the next two replaces the task's optimizer
    momentum: float = within(0.0, 0, 0.9999)
    weight_decay: float = within(0.0, 0, 1)
    batch_size: int = within(0, 0, 100_000)  # 0: task's own
    test_samples: int = within(2000, 1, 10_000_000)  # the first so many of the test data are evaluated
    evaluate_s: float = within(5.0, 0.001, 1e6)  # time between two points of the series
    target_accuracy: float = within(0.0, 0, 1)  # promised mean accuracy at the end; 0: nothing promised
    # torch threads, fixed so that sums are too. Small models gain nothing from two, and on a busy machine two wait for each other
    # (measured: churn, 60 virtual s beside three other jobs on two cores: 8 s with one, 43 s with two)
    threads: int = within(1, 1, 256)

    # how it is learned
    merge: str = "Adaptive"
    local_steps: int = within(20, 1, 100_000)
    fan_out: int = within(2, 1, 5000)
    merge_inputs_max: int = within(4, 1, 5000)
    cycle_s: float = within(0.0, 0, 1e6)
    self_weight: float = within(0.0, 0, 0.9999)  # 0: by age and samples, as any other's
    merge_tolerance: float = within(1.5, 0, 1e9)  # a merge above so many times the untrained loss is refused; 0: kept unseen

    # shared-seed mode; local_steps is how many probes are made in a row, cycle_s as above. 0 and "": as the task's recipe has it
    protocol: str = one_of(*PROTOCOLS)  # models, or scalars
    code: str = ""
    scalar_lr: float = within(0.0, 0, 100)
    epsilon: float = within(0.0, 0, 1)
    scale: float = within(0.0, 0, 1e9)
    schedule: str = ""
    horizon: int = within(0, 0, 2**48)
    run_entries: int = within(256, 1, 100_000)
    run_s: float = within(5.0, 0, 1e6)
    quiet_s: float = within(0.0, 0, 1e6)  # learning pauses so long before the end: then all ledgers must be equal; 0: no promise

    # the machines
    step_s: float = within(0.05, 1e-6, 1e4)  # one local step on a machine of middling speed
    step_jitter: float = within(0.2, 0, 0.99)  # each training takes 1 - jitter … 1 + jitter of that
    speed_spread: float = within(0.0, 0, 0.99)  # machines differ: 1 - spread … 1 + spread, for good
    probe_s: float = within(0.05, 1e-6, 1e4)  # one probe: two losses, no gradient
    merge_s: float = within(0.02, 0, 1e4)
    apply_s: float = within(0.01, 0, 1e4)  # adding entries to the sum, hashing it, and the like
    fsync_s: float = within(0.005, 0, 1e4)
    # a node that comes back goes on from its last one, as the daemon does; 0: its model and what it remembered are gone
    checkpoint_every_s: float = within(30.0, 0, 1e6)
    start_s: float = within(2.0, 0, 1e6)  # nodes start at random within so long

    # the network
    topology: str = one_of(*TOPOLOGIES)  # overlay: bootstraps are given, the membership protocol does the rest
    degree: int = within(4, 1, 5000)  # links a node (k_regular), expected (erdos_renyi), links of a newcomer (barabasi_albert)
    bootstraps: int = within(1, 1, 100)  # the first so many nodes (of each island); they never leave
    latency_ms_min: float = within(10.0, 0, 1e6)  # one way; each pair has its own, drawn evenly
    latency_ms_max: float = within(60.0, 0, 1e6)
    bandwidth_mbit: float = within(100.0, 0.001, 1e6)  # uplink of each node
    dial_timeout_s: float = within(5.0, 0.001, 1e4)  # until a dial to a machine that is off fails

    limits: Mapping[str, float] = field(default_factory=dict)  # of protocols.limits.Limits

    def __post_init__(self) -> None:
        for known in fields(self):
            check_range(known, getattr(self, known.name))
        wrong = _inconsistent(self)
        if wrong:
            raise ScenarioError(wrong)
        self.protocol_limits()

    @property
    def mends(self) -> bool:
        """Whether one overlay is promised for the end: not where fixed neighbours were lost, islands stay islands, or
        nodes meet now and then.
        """
        if self.contacts:
            return False
        lost = self.loss_fraction and self.topology != "overlay" and not self.repair
        return not lost and (self.islands == 1 or self.islands_until_s > 0)

    def island(self, index: int) -> int:
        """The island of a node."""
        return index % self.nodes * self.islands // self.nodes

    def part(self, index: int) -> tuple[int, int]:
        """Which part of the data of how many is a node's; whoever joins later has that of somebody who was there.

        Where islands have classes of their own, the nodes of each share all of the data, and take those classes from their part.
        """
        index %= self.nodes
        if not self.disjoint_classes:
            return index, self.nodes
        mates = [one for one in range(self.nodes) if self.island(one) == self.island(index)]
        return mates.index(index), len(mates)

    @property
    def firsts(self) -> tuple[int, ...]:
        """The bootstraps: the first so many nodes of each island."""
        return tuple(
            one
            for island in range(self.islands)
            for one in [index for index in range(self.nodes) if self.island(index) == island][: self.bootstraps]
        )

    @property
    def control(self) -> Scenario:
        """The same run without any faults."""
        off: dict[str, Any] = {one.name: one.default for one in fields(Faults) if one.name not in KEPT}
        return replace(self, draw="", **off)

    def gossip(self) -> GossipSettings:
        """The part the core is told."""
        share = self.self_weight or None
        return GossipSettings(self.local_steps, self.fan_out, self.merge_inputs_max, self.cycle_s, share)

    def scalars(self, code: str) -> ScalarSettings | None:
        """The same for shared-seed mode; None: not in it. `code`: the recipe's."""
        if self.protocol == "models":
            return None
        return ScalarSettings(code, self.local_steps, self.cycle_s, self.run_entries, self.run_s)

    def protocol_limits(self) -> Limits:
        """The default limits with this scenario's changes. Raises ScenarioError for one that doesn't exist or fit."""
        names = {known.name: type(getattr(LAPTOP, known.name)) for known in fields(Limits)}
        changed: dict[str, Any] = {}
        for key, value in self.limits.items():
            if key not in names:
                raise ScenarioError(f"there is no limit '{key}'{nearest(key, names)}; protocols/limits.py lists them.")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ScenarioError(f"limit {key} is {value!r}; give a number.")
            changed[key] = names[key](value)
        try:
            return replace(LAPTOP, **changed)
        except ValueError as error:
            raise ScenarioError(f"{error}; change [limits].") from None


def load(source: str, changes: Iterable[str] = (), seed: int | None = None) -> Scenario:
    """The scenario in a TOML file, or the shipped one of that name, with `key=value` changes on top. Raises ScenarioError."""
    path = _find(source)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"scenario {source} can't be read: {error}; give a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"scenario {source} isn't TOML: {error}; correct it there.") from None
    values.setdefault("name", path.stem)
    changed: dict[str, Any] = {"limits": values["limits"]} if "limits" in values else {}
    for change in changes:
        _set(changed, change)
    if seed is not None:
        changed["seed"] = seed
    if {**values, **changed}.get("draw") == "swarm":
        values |= _drawn({**values, **changed})
    values |= changed
    if isinstance(trace := values.get("contacts"), str) and (path.parent / trace).is_file():
        values["contacts"] = str(path.parent / trace)
    return build(values)


def _drawn(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the seed of a scenario draws. Raises ScenarioError when that scenario isn't one."""
    undrawn = build({**values, "draw": ""})
    if not 0 < undrawn.heal_s < undrawn.seconds:
        raise ScenarioError("who draws faults must see them end; set heal_s above 0 and below seconds.")
    return drawn(undrawn.seed, undrawn.seconds, undrawn.heal_s)


def build(values: Mapping[str, Any]) -> Scenario:
    """A scenario from plain values. Raises ScenarioError for an unknown key, a wrong type or a number out of range."""
    known = {one.name: one for one in fields(Scenario)}
    for key in values:
        if key not in known:
            raise ScenarioError(f"there is no scenario key '{key}'{nearest(key, known)}; scenario.py and faults.py list them.")
    return Scenario(**{key: typed(known[key], value) for key, value in values.items()})


def shipped() -> list[str]:
    """Names of the scenarios that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml") if path != REGRESSIONS)


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    named = SHIPPED / f"{source.removesuffix('.toml')}.toml"
    if path.name == source and named.is_file():
        return named
    raise ScenarioError(f"there is no scenario {source}; give a TOML file or one of {', '.join(shipped())}.")


def _set(values: dict[str, Any], change: str) -> None:
    """Apply `key=value`; the value is TOML, or else plain text."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ScenarioError(f"'{change}' is no change; write key=value, such as nodes=50.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table, dot, name = key.strip().partition(".")
    if not dot:
        values[table] = value
    elif table == "limits":
        values["limits"] = {**values.get("limits", {}), name: value}
    else:
        raise ScenarioError(f"'{key.strip()}' is no scenario key; only limits has keys of its own.")


def _inconsistent(scenario: Scenario) -> str | None:
    churns = scenario.leave_per_minute or scenario.join_per_minute
    if churns and scenario.topology != "overlay" and not scenario.repair:
        return "nodes that come and go need an overlay that repairs itself; set topology=overlay or repair=true, or no churn."
    if scenario.repair and scenario.topology == "overlay":
        return "repair is for a given graph, the overlay repairs itself; set a topology or leave repair out."
    if scenario.hidden and scenario.convolutional:
        return "hidden and convolutional both replace the task's model; leave one out."
    if scenario.protocol == "scalars" and not (scenario.same_init or scenario.pretrain_steps):
        return "shared-seed mode sums changes of one model; set same_init=true or pretrain_steps."
    if scenario.latency_ms_min > scenario.latency_ms_max:
        return "latency_ms_min is above latency_ms_max; exchange them."
    if scenario.islands > scenario.nodes:
        return "there are more islands than nodes; lower islands."
    if scenario.islands_until_s > scenario.seconds:
        return "islands_until_s is after the end; lower it, or leave it out and they never meet."
    if scenario.bootstraps > scenario.nodes:
        return "there are more bootstraps than nodes; lower bootstraps."
    if scenario.equivocators + scenario.garblers > scenario.nodes - scenario.bootstraps:
        return "liars are no bootstraps, so there are too few nodes for them; lower equivocators or garblers."
    return faults.inconsistent(scenario)
