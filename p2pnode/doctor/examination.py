"""The whole examination: what is asked, of whom, in which order, and until when.

Owns the order of the findings and the deadlines. With a running daemon, that one is asked for its status and walks to the peers
itself; without one we do it with its key. Ends within `EXAMINATION_S_MAX`, whatever hangs.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pnode.config import Config
from p2pnode.control import ControlError, NotRunning, ask_async
from p2pnode.doctor import invitations, listening, machine, multicast, peers, resting, running
from p2pnode.doctor.finding import Finding, fail, ok, unknown, warn
from p2pnode.errors import ConfigError
from p2pnode.folder import LOCK_FILE
from p2pnode.keyring import Keyring
from p2pnode.probing import ADDRESSES_MAX, PROBE_S_MAX, Trail
from p2pnode.transport import TransportLimits

STATUS_S_MAX = 10.0  # a daemon under load answers in a second or two
SMALL_S_MAX = 10.0  # listening, multicast: their own deadlines are shorter
WALK_S_MAX = PROBE_S_MAX + 10.0  # all walks at once, and loading libp2p before
EXAMINATION_S_MAX = STATUS_S_MAX + WALK_S_MAX + 5.0


log = logging.getLogger(__name__)


@dataclass(slots=True)
class Case:
    """What is examined. `status`: of the daemon that runs, or None. `given`: addresses and invitations that a person named."""

    folder: Path
    config: Config
    given: tuple[str, ...] = ()
    status: dict[str, Any] | None = None
    held: bool = False  # a daemon has the folder, whether it answers or not
    ring: Keyring | None = None
    findings: list[Finding] = field(default_factory=list)


async def examine(folder: Path, config: Config | ConfigError, given: Sequence[str] = ()) -> list[Finding]:
    """All findings about the node of `folder`. `config`: its config, or what is wrong with it. Never raises for what it finds."""
    findings = []
    if isinstance(config, ConfigError):
        findings.append(fail("config", str(config), "mend the file; the checks below go by the defaults"))
        config = Config(data_dir=folder)
    else:
        findings.append(ok("config", "the configuration can be read"))
    case = Case(folder, config, tuple(given[:ADDRESSES_MAX]), findings=findings)
    if len(given) > ADDRESSES_MAX:
        text = f"only the first {ADDRESSES_MAX} of {len(given)} addresses are looked at"
        findings.append(warn("doctor", text, "ask again for the others"))
    try:
        async with asyncio.timeout(EXAMINATION_S_MAX):
            await _examine(case)
    except TimeoutError:
        text = f"the examination was broken off after {EXAMINATION_S_MAX:.0f} s"
        case.findings.append(fail("doctor", text, "this machine is overloaded; try again"))
    return case.findings


async def _examine(case: Case) -> None:
    for id, check in (("folder", machine.check_folder), ("disk", machine.check_disk), ("clock", machine.check_clock)):
        case.findings += _guarded(id, check, case.folder)
    await _ask_daemon(case)
    pid = case.status.get("pid") if case.status else None
    case.findings += _guarded("descriptors", machine.check_descriptors, pid, TransportLimits())
    case.ring, wrong = invitations.read_ring(case.folder)
    targets, about = invitations.read_targets(case.given or case.config.join, case.ring)
    if not (case.given or targets.addresses) and case.status is None:
        targets = invitations.Targets(resting.remembered(case.folder), None)
    case.findings += [*wrong, *about, *_check_swarm(case)]
    listen, mdns, walks, helpers = await asyncio.gather(
        _bounded("listen", _listen(case), SMALL_S_MAX),
        _bounded("mdns", multicast.check_mdns(_uses_mdns(case)), SMALL_S_MAX),
        _bounded("peer", _walk(case, targets), WALK_S_MAX),
        _bounded("helper", _walk_to_helpers(case), WALK_S_MAX),
    )
    case.findings += listen
    case.findings += _guarded("reach", listening.check_reach, case.config, case.status, targets.addresses)
    case.findings += mdns
    if case.status is not None:
        case.findings += _guarded("daemon", running.check_running, case.status)
    elif not case.held:
        case.findings += _check_sources(case, targets)
    case.findings += [*helpers, *walks]


async def _bounded(id: str, check: Awaitable[Iterable[Finding]], seconds: float) -> list[Finding]:
    """The check's findings, or that it took too long or broke: one check never keeps the others' findings back."""
    try:
        async with asyncio.timeout(seconds):
            return list(await check)
    except TimeoutError:
        return [unknown(id, f"this check took longer than {seconds:.0f} s", "this machine is overloaded; try again")]
    except Exception as error:  # a bug of ours in one check; the others are worth having
        return [_broken(id, error)]


def _guarded(id: str, check: Callable[..., Iterable[Finding]], *about: Any) -> list[Finding]:
    """Likewise, for a check that waits for nothing."""
    try:
        return list(check(*about))
    except Exception as error:
        return [_broken(id, error)]


def _broken(id: str, error: Exception) -> Finding:
    log.debug("a check broke", exc_info=error)
    return unknown(id, f"this check broke ({type(error).__name__}: {error})", "please report it")


# --- the daemon -------------------------------------------------------------------------------------------------------


async def _ask_daemon(case: Case) -> None:
    case.held, holder = _holder(case.folder)
    try:
        case.status = await ask_async(case.folder, {"do": "status"}, STATUS_S_MAX)
    except NotRunning:
        if case.held:
            text = f"process {holder} holds {case.folder}, but answers no questions"
            advice = f"it is starting, or it hangs: wait a minute, then end it with `kill {holder}`"
            case.findings.append(fail("daemon", text, advice))
        else:
            case.findings.append(ok("daemon", "no daemon runs on this folder; looking without one"))
    except TimeoutError:
        text = f"the daemon on this folder (process {holder}) doesn't answer within {STATUS_S_MAX:.0f} s"
        case.findings.append(fail("daemon", text, "look at its log; if it goes on, kill it and start it again"))
    except (ControlError, ConfigError) as error:
        case.findings.append(fail("daemon", f"the daemon can't say how it is: {error}", "look at its log"))
    else:
        state = case.status.get("state")
        text = f"the daemon runs (process {case.status.get('pid')}, {state})"
        case.findings.append(ok("daemon", text))


def _holder(folder: Path) -> tuple[bool, str]:
    """Whether a process has locked the folder, and which. Changes nothing."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True, file.read(32).decode("ascii", "replace").strip() or "?"
    except OSError:
        pass
    return False, ""


def _check_swarm(case: Case) -> Iterable[Finding]:
    if getattr(case.config, "open", False) or (case.status or {}).get("access") == "open":
        yield warn("swarm", "the swarm is open: whoever finds this node may join it", "run without --open, and invite people")


def _check_sources(case: Case, targets: invitations.Targets) -> Iterable[Finding]:
    """Whether there is any way at all to find somebody."""
    config = case.config
    if not (targets.addresses or config.mdns or config.via):
        text = "this node has no way to find others: no address to join, no helper, and mdns = false"
        yield warn("sources", text, "join with an invitation or an address (--join); the first node of a swarm needs none")


def _uses_mdns(case: Case) -> bool:
    """As the daemon was started, which may be with other flags than we; else as the config says."""
    if case.status is None or "discovery" not in case.status:
        return case.config.mdns
    return any(source.get("source") == "mdns" for source in case.status["discovery"])


async def _listen(case: Case) -> list[Finding]:
    if case.held and case.status is None:
        return [unknown("listen", "the daemon that holds this folder doesn't say where it listens")]
    return await listening.check_listen(case.config, case.status)


# --- walks ------------------------------------------------------------------------------------------------------------


async def _walk(case: Case, targets: invitations.Targets) -> list[Finding]:
    if not targets.addresses and (case.given or case.status is None):
        return []
    if case.held and case.status is None:  # to its peers we would be that daemon dialling anew
        return [unknown("peer", "nobody was walked to, because the daemon that holds this folder doesn't answer")]
    trails, swarm = await _trails(case, targets)
    now = time.time()
    return [finding for trail in trails for finding in (peers.of_peer(trail, swarm), *peers.of_clocks(trail, now))]


async def _walk_to_helpers(case: Case) -> list[Finding]:
    via = invitations.Targets(case.config.via[:ADDRESSES_MAX], None)
    if not via.addresses or (case.held and case.status is None):
        return []
    trails, _ = await _trails(case, via)
    return [peers.of_helper(trail) for trail in trails]


async def _trails(case: Case, targets: invitations.Targets) -> tuple[list[Trail], str]:
    """The trail to each target, by our daemon if one answers (without targets: to those it was told), and our swarm's name."""
    addresses = list(targets.addresses[:ADDRESSES_MAX])
    if case.status is not None:
        answer = await ask_async(case.folder, {"do": "probe", "addresses": addresses}, WALK_S_MAX)
        return [Trail.read(document) for document in answer["trails"]], str(case.status.get("swarm"))
    from p2pnode.libp2p_probe import Asker, probe  # heavy: only when there is somebody to walk to
    from protocols.core import swarm_digest

    seed, gate, swarm = invitations.credentials(case.folder, case.config, case.ring, targets)
    asker = Asker(seed, swarm_digest(swarm), resting.saved_schema(case.folder), gate, bounds=case.config.bounds)
    return await probe(asker, addresses), swarm
