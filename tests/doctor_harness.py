"""What the doctor's tests share: a data folder as a stopped node leaves it, and how a finding is looked up and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pnode.config import Config
from p2pnode.doctor.finding import Finding, Level
from protocols.core import swarm_digest
from protocols.identity import Identity, peer_text
from protocols.messages import Hello
from protocols.wire import encode as encode_message

SWARM = "garden"
SEED, OTHER_SEED = b"\x01" * 32, b"\x02" * 32
SCHEMA = b"s" * 16
US = Identity(SEED).peer
NOBODY = peer_text(Identity(b"\x09" * 32).peer)


def hello(swarm: str = SWARM, schema: bytes = SCHEMA) -> bytes:
    return encode_message(Hello(swarm_digest(swarm), schema, ()))


def folder_of(tmp_path: Path, schema: bytes = SCHEMA) -> Path:
    """A data folder as a stopped node leaves it: key, and a model of this schema."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    (folder / "identity.key").write_bytes(SEED)
    (folder / "identity.key").chmod(0o600)
    save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors", {"schema": schema.hex()})
    return folder


def config_of(folder: Path, **more: Any) -> Config:
    return Config(**{"data_dir": folder, "swarm": SWARM, "listen": ("/ip4/127.0.0.1/tcp/0",), "mdns": False, **more})


def named(findings: list[Finding], id: str, about: str | None = None) -> Finding:
    """The one finding of this check, about this address or file."""
    found = [one for one in findings if one.id == id and about in (None, one.about)]
    assert len(found) == 1, f"{len(found)} findings {id!r} about {about}: {findings}"
    return found[0]


def says(finding: Finding, level: Level, *words: str) -> None:
    assert finding.level is level, finding
    for word in words:
        assert word in finding.text, finding
    assert finding.next or level in (Level.OK, Level.UNKNOWN), f"what to do is missing: {finding}"
    assert "\n" not in finding.text + finding.next
