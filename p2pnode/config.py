"""What a person may set, and nothing else: one frozen dataclass whose fields are the keys.

Owns the keys, their defaults and their checks; where they are read from is `config_files.py`'s. Never guesses: a wrong type or a
value out of range is a `ConfigError` of one sentence. Every bound that isn't a person's business lives in `protocols.limits`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from p2pnode import invitation
from p2pnode.errors import ConfigError
from p2pnode.pacing import Rates, patience_s
from p2pnode.sizes import format_size, parse_rate, parse_size
from protocols.identity import peer_from_text
from protocols.limits import EDGE, LAPTOP, Limits
from protocols.merkle import CHUNK_BYTES

T = TypeVar("T")

TEXT_CHARACTERS_MAX = 256  # longest value of a text key; also the longest multiaddr that peers accept
LIST_ITEMS_MAX = 64  # longest list; nobody types more bootstraps
BUDGET_MIN = 10_000_000  # bytes a day: one idle link alone takes 7 MB of probes and shuffles (measured: 77 bytes/s)
MODELS, SCALARS, BOTH = PROTOCOLS = ("models", "scalars", "both")
PRESETS: dict[str, Limits] = {"laptop": LAPTOP, "edge": EDGE}


DEFAULT_SWARM = "default"
_UNSET = Path()


def _key(
    default: T,
    doc: str,
    *,
    low: float | None = None,
    high: float = 1e6,
    choices: tuple[str, ...] = (),
    empty: bool = True,
    shown: bool = True,
) -> T:
    """A field with what a person must know about it, and the values it may have. `shown`: in a repr."""
    meta = {"doc": doc, "low": low, "high": high, "choices": choices, "empty": empty}
    made: T = field(default=default, repr=shown, metadata=meta)
    return made


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_DATA_HOME/p2pnode`, else `~/.local/share/p2pnode` (XDG base directory specification)."""
    base = environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path(environ.get("HOME") or "~").expanduser() / ".local/share") / "p2pnode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All that a person may set. Raises ConfigError when a value is wrong. Keys of the TOML file have the same names."""

    swarm: str = _key(
        DEFAULT_SWARM, "Name of the swarm, unless an invitation says it. Seeds the models' common start.", empty=False
    )
    name: str = _key("", "What people call this node. Empty: the end of its peer id.")
    data_dir: Path = _key(  # noqa: RUF009 - it is a field like the others
        _UNSET, "Folder of identity, state, model and control socket. Empty: p2pnode under $XDG_DATA_HOME."
    )
    task: str = _key(
        "digits",
        "What to train: digits, fashion-mnist, mnist, sentiment, or yours: module:function, path.py:function.",
        empty=False,
    )
    listen: tuple[str, ...] = _key(
        ("/ip4/0.0.0.0/tcp/0",),
        "Multiaddrs to listen on; /ip4/127.0.0.1/tcp/0 keeps other machines out. Port 0: a free one, kept over restarts.",
        empty=False,
    )
    announce: tuple[str, ...] = _key((), "Multiaddrs to tell others instead of those we listen on (behind a forwarded port).")
    join: tuple[str, ...] = _key(
        (), "Invitations (`p2pnode invite`) or multiaddrs of members. One that answers is enough.", shown=False
    )
    open: bool = _key(False, "Let anybody in who knows the swarm's name and trains the same model, without an invitation.")
    mdns: bool = _key(True, "Find nodes of this swarm in the local network by multicast DNS, and be found.")
    relay: bool = _key(
        False, "Be a public helper, for anybody, within limits: relay, directory, and dial-backs that say who can be reached."
    )
    upnp: bool = _key(True, "Ask the router to let others in (UPnP), unless we listen on loopback only.")
    via: tuple[str, ...] = _key(
        (),
        "Multiaddrs, each with /p2p/<id>, of public helper nodes (`relay = true`) through which far members find each other.",
    )
    max_upload: str = _key("", "Most that is sent in a second, such as 200 kB, all peers together. Empty: no limit.")
    max_download: str = _key("", "Most that is received in a second, such as 1.5 MB, all peers together. Empty: no limit.")
    budget: str = _key(
        "", "Most that is sent and received in a day (UTC), such as 2 GB. Models stop near its end, all at it. Empty: none."
    )
    protocol: str = _key(
        "models",
        "What nodes exchange: models, scalars (a byte for each projected gradient, for thin links), or both.",
        choices=PROTOCOLS,
    )
    run_entries: int = _key(
        256,
        "Scalars: gradients that are signed and sent together. The signature's 64 bytes are shared by them.",
        low=1,
        high=1024,
    )
    run_s: float = _key(5.0, "Scalars: seconds that a gradient waits for others to be sent with. Guess.", low=0, high=3_600)
    models_every_s: float = _key(
        600.0, "Both: least seconds from one round of training and exchange of models to the next. Guess.", low=0, high=86_400
    )
    merge: str = _key("Adaptive", "Merge rule: Adaptive, VarianceCorrected, or FedAvg (plain weighted mean).", empty=False)
    local_steps: int = _key(
        20, "Optimizer steps from one offer to peers to the next; with scalars, gradients measured in a row. Guess.", low=1
    )
    fan_out: int = _key(2, "Peers that each new model is offered to. Guess.", low=1, high=32)
    merge_inputs_max: int = _key(4, "Models of peers in one merge. Guess.", low=1, high=64)
    cycle_s: float = _key(
        0.5, "Least seconds from one round of training and exchange to the next; more saves traffic. Guess.", low=0, high=86_400
    )
    merge_tolerance: float = _key(
        1.5, "A merge is kept while the loss on local data is at most so many times that before, or of an untrained model.", low=0
    )
    shard_index: int = _key(0, "Which part of the data is this node's, from 0.", low=0)
    shard_count: int = _key(1, "How many parts the data is cut into.", low=1)
    shard_seed: int = _key(0, "Seed of the cut; the same for all nodes, so that parts don't overlap.", low=0, high=2**63 - 1)
    alpha: float = _key(0.0, "Built-in tasks: Dirichlet concentration of labels; 0.3 is far from IID. 0: even parts.", low=0)
    device: str = _key("auto", "Torch device of the training process: auto, cpu, cuda.", empty=False)
    threads: int = _key(0, "Processor threads of the training process. 0: half of those this machine has.", low=0, high=1024)
    measure_alone: bool = _key(False, "Also train a copy without exchange, to show what peers are worth. Doubles the work.")
    evaluate_every_s: float = _key(
        10.0,
        "Seconds between two tests of the model; without measure_alone they take at most a tenth of the time.",
        low=0.1,
        high=86_400,
    )
    checkpoint_every_s: float = _key(
        30.0,
        "Seconds between two checkpoints of all that was learnt; at most a tenth of the time goes there. A clean stop makes one.",
        low=0.1,
        high=86_400,
    )
    checkpoint_every_steps: int = _key(
        0, "Also make a checkpoint after so many local steps (gradients, with scalars). 0: by time only.", low=0, high=1e9
    )
    limits: str = _key("laptop", "Preset of all bounds: laptop, or edge for a small board.", choices=tuple(PRESETS))
    log_level: str = _key("info", "Least level of the daemon's log lines.", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        hints = get_type_hints(Config)
        for f in fields(self):
            value = _typed(f.name, hints[f.name], getattr(self, f.name))
            _check(f.name, value, f.metadata)
            object.__setattr__(self, f.name, value)
        if self.data_dir == _UNSET:
            object.__setattr__(self, "data_dir", default_data_dir())
        if self.shard_index >= self.shard_count:
            raise ConfigError(f"shard_index is {self.shard_index}, but with shard_count {self.shard_count} the last part is "
                              f"{self.shard_count - 1}; count parts from 0")  # fmt: skip
        _ = self.rates, self.budget_bytes
        for key in ("listen", "announce", "join", "via"):
            for address in getattr(self, key):
                _check_address(key, address)

    @property
    def bounds(self) -> Limits:
        """The limits that the preset names, with more patience for chunks where our own rate is what they wait for."""
        preset = PRESETS[self.limits]
        return replace(preset, chunk_gap_s_max=preset.chunk_gap_s_max + patience_s(self.rates.download, CHUNK_BYTES))

    @property
    def with_models(self) -> bool:
        """Whether models are trained and exchanged."""
        return self.protocol != SCALARS

    @property
    def with_scalars(self) -> bool:
        """Whether projected gradients are measured and exchanged."""
        return self.protocol != MODELS

    @property
    def rates(self) -> Rates:
        """Most bytes a second, up and down. ConfigError when they are no sizes, or too small."""
        return Rates(*(parse_rate(text, key) if text else 0 for key, text in (
            ("max_upload", self.max_upload), ("max_download", self.max_download))))  # fmt: skip

    @property
    def budget_bytes(self) -> int:
        """Most bytes a day; 0: no limit. ConfigError when it is no size, or too small."""
        size = parse_size(self.budget, "budget") if self.budget else 0
        if 0 < size < BUDGET_MIN:
            raise ConfigError(
                f"budget is {format_size(size)} a day, less than a member needs; give {format_size(BUDGET_MIN)} or more"
            )
        return size


def _typed(key: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`, from what TOML or Python has (an int will do for a float, a list for a tuple, text for a path)."""
    match value:
        case bool() if kind is not bool:
            pass
        case str() | os.PathLike() if kind is Path:
            return Path(value).expanduser()
        case list() | tuple() if kind == tuple[str, ...] and all(isinstance(item, str) for item in value):
            return tuple(value)
        case int() if kind is float:
            return float(value)
        case _ if kind in (str, int, float, bool) and isinstance(value, kind):
            return value
    wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    raise ConfigError(f"{key} must be {wanted.get(kind, 'a list of texts')}, not {value!r}")


def _check(key: str, value: Any, meta: Mapping[str, Any]) -> None:
    texts = value if isinstance(value, tuple) else (str(value),) if isinstance(value, str | Path) else ()
    if not value and not meta["empty"] and not isinstance(value, bool | int | float):
        raise ConfigError(f"{key} is empty; give it a value or leave the key out")
    if len(texts) > LIST_ITEMS_MAX:
        raise ConfigError(f"{key} has {len(texts)} items; at most {LIST_ITEMS_MAX} are allowed")
    for text in texts:
        unbounded = isinstance(value, Path) or invitation.is_invitation(text)  # which has a bound of its own
        if not text.isprintable() or (len(text) > TEXT_CHARACTERS_MAX and not unbounded):
            raise ConfigError(f"{key} must be printable and have at most {TEXT_CHARACTERS_MAX} characters")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{key} is {value!r}; choose from {', '.join(meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if low is not None and not low <= value <= high:  # also catches NaN
        raise ConfigError(f"{key} is {value!r}; it must be from {low:,} to {high:,.0f}")


def _check_address(key: str, address: str) -> None:
    if key == "join" and invitation.is_invitation(address):
        invitation.decode(address)
        return
    if not address.startswith("/") or not address.isascii():
        what = "neither an invitation (`p2pnode invite`) nor a multiaddr" if key == "join" else "no multiaddr"
        raise ConfigError(f"{key} has '{address}', which is {what}; one looks like /ip4/192.0.2.7/tcp/4001")
    if key in ("join", "via"):
        check_join(address, key)


def check_join(address: str, key: str = "join") -> None:
    """Raises ConfigError unless `address` is a multiaddr that names the peer to expect there."""
    _, found, text = address.rpartition("/p2p/")
    if not address.startswith("/") or not found:
        raise ConfigError(f"{key} address '{address}' names no peer; paste the whole line that the other node printed")
    try:
        peer_from_text(text)
    except ValueError as error:
        raise ConfigError(f"{key} address '{address}' is damaged ({error}); paste the whole line again") from None
