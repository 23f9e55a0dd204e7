"""What `reliability.py` runs: each command, and the promises whose counts it yields.

Owns the list only. A key is a test's word (`tests.tally`); a test holds that every word that is tallied has a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One promise. `key`: as tests tally it.

    `all_of_them`: the tries are every case there is, so their number bounds nothing. `control`: no promise, but how it would be
    without what keeps one.
    """

    key: str
    promise: str
    all_of_them: bool = False
    control: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One command and the rows that it fills. `short`: the same with less of it."""

    name: str
    command: str
    rows: tuple[Row, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    env_short: Mapping[str, str] = field(default_factory=dict)
    short: str = ""


LOGS = Row("exceptions in logs", "meanwhile: swarms of daemons with an unexpected line in a log, or a count of errors")

RUNS = (
    Run(
        "crash points",
        "python -m pytest -q --timeout=0 tests/test_crash_points.py",
        (
            Row(
                "crash points",
                "power cuts after any write, fsync or rename; what wasn't synced dropped, torn or kept: no good state",
            ),
        ),
        {"P2PNODE_CRASH_SEEDS": "100"},
        {"P2PNODE_CRASH_SEEDS": "8"},
    ),
    Run(
        "bit rot",
        "python -m pytest -q --timeout=0 tests/test_bit_rot.py tests/test_scalar_learner.py -k 'bit or rot'",
        (Row("bit rot", "one random bit flipped in a stored file, whichever: used as if nothing were wrong"),),
        {"P2PNODE_BIT_FLIPS": "1000"},
        {"P2PNODE_BIT_FLIPS": "50"},
    ),
    Run(
        "full disk",
        "python -m pytest -q --timeout=0 tests/test_full_disk.py",
        (
            Row(
                "disk full",
                "a disk that is full, or fails, at any step of a node's life, for a while: something lost, or no way on",
            ),
        ),
        {"P2PNODE_DISK_SEEDS": "20"},
        {"P2PNODE_DISK_SEEDS": "2"},
    ),
    Run(
        "same bits",
        "python -m pytest -q --timeout=0 tests/test_checkpoint_files.py tests/test_trainer_faults.py",
        (
            Row(
                "a cut anywhere, and the same bits afterwards",
                "training cut anywhere and resumed from the checkpoint: other bits",
            ),
            Row("a training process killed and started anew: the same bits", "training processes killed and resumed: other bits"),
        ),
        {"P2PNODE_CHECKPOINT_CUTS": "300"},
        {"P2PNODE_CHECKPOINT_CUTS": "60"},
    ),
    Run(
        "swarm",
        "python -m pytest -q --timeout=0 tests/test_swarm.py -k no_seed_breaks",
        (Row("swarm seeds", "simulated swarms, each seed with faults of its own: a check broken, or not healed"),),
        {"P2PNODE_SWARM_SEEDS": "2000"},
        {"P2PNODE_SWARM_SEEDS": "200"},
    ),
    Run(
        "partitions",
        "python -m pytest -q --timeout=0 tests/test_partitions.py -k any_shape",
        (Row("partitions", "simulated partitions of six shapes: not one overlay again within two shuffle intervals"),),
        {"P2PNODE_PARTITION_SEEDS": "200", "P2PNODE_PARTITION_SPANS": "10,300,3600"},
        {"P2PNODE_PARTITION_SEEDS": "10"},
    ),
    Run(
        "disaster",
        "python -m pytest -q --timeout=0 tests/test_disasters.py -k alone_for_a_minute",
        (Row("disaster", "half of a swarm, those with most links, gone at once: survivors not one overlay again in time"),),
        {"P2PNODE_DISASTER_SEEDS": "200"},
        {"P2PNODE_DISASTER_SEEDS": "20"},
    ),
    Run(
        "probing",
        "python -m pytest -q --timeout=0 tests/test_probing.py",
        (
            Row("dead_noticed", "a peer that vanished without a word: not noticed in time"),
            Row("grey_nodes", "peers given up for dead beside nodes that stand still for 5 to 20 s: healthy ones"),
            Row("grey_nodes_without_health", "the same by a node that takes no account of its own health", control=True),
        ),
        {"P2PNODE_GREY_HOURS": "2"},
        {"P2PNODE_GREY_HOURS": "0.3"},
    ),
    Run(
        "kills",
        "python -m tests.soak kills --kills 200",
        (
            Row("sigkill states", "SIGKILL of a daemon, half of them while it saves: states that couldn't be read"),
            Row("sequence numbers", "sequence numbers heard by others: said twice, or gone back, after a SIGKILL"),
            Row("identities", "identities lost by a SIGKILL"),
            Row("restarts after sigkill", "restarts that didn't go on learning"),
            LOGS,
        ),
        short="python -m tests.soak kills --kills 40",
    ),
    Run(
        "terms",
        "python -m tests.soak terms --terms 500",
        (
            Row(
                "sigterm", "SIGTERM under load: another exit status than 0, over 5 s, or a process, socket or temporary file left"
            ),
            LOGS,
        ),
        short="python -m tests.soak terms --terms 100",
    ),
    Run(
        "trainer",
        "python -m tests.soak trainer --deaths 100",
        (Row("trainer deaths", "SIGKILL of the training process: training not resumed in 30 s, or the node gone"), LOGS),
        short="python -m tests.soak trainer --deaths 20",
    ),
    Run(
        "hangs",
        "python -m tests.soak hangs --hangs 8",
        (Row("trainer hangs", "training processes stopped for good: not replaced, or the node gone"), LOGS),
        short="python -m tests.soak hangs --hangs 2",
    ),
    Run(
        "pauses",
        "python -m tests.soak pauses",
        (Row("pauses", "SIGSTOP of a daemon for 1 to 60 s: it didn't come back, or something stale of it was merged"), LOGS),
    ),
    Run(
        "proxy",
        "python -m tests.soak proxy --minutes 5",
        (Row("proxy faults", "connections cut, delayed or stalled by a proxy: a daemon that didn't recover"),),
        short="python -m tests.soak proxy --minutes 1",
    ),
    Run(
        "disk",
        "python -m tests.soak disk --fills 20",
        (
            Row(
                "disk full (daemon)",
                "a full file system under a daemon: it ended, said nothing of it, or didn't go on with space",
            ),
        ),
        short="python -m tests.soak disk --fills 5",
    ),
    Run(
        "namespaces",
        "python -m tests.soak namespaces --partitions 3",
        (Row("namespace partition", "network namespaces cut apart and joined: daemons that didn't find each other again"),),
        short="python -m tests.soak namespaces --partitions 1",
    ),
    Run(
        "soak",
        "python -m tests.soak soak --minutes 60",
        (Row("soak", "memory, descriptors, threads or tasks of a process that grew over an hour (short: minutes)"), LOGS),
        short="python -m tests.soak soak --minutes 2",
    ),
    Run(
        "planted",
        "python -m tests.planted",
        (Row("planted bugs", "bugs planted in the code: not noticed by any test", all_of_them=True),),
    ),
)
