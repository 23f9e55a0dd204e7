"""Files that last: whole or not at all, in the order that makes them so."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pnode import durable

STEPS = ("open_file", "put", "sync", "rename", "link", "unlink")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were done, in order."""
    done: list[str] = []
    for name in STEPS:
        original = getattr(durable, name)

        def logged(*given: object, name: str = name, original: object = original) -> object:
            folder = name == "sync" and stat.S_ISDIR(os.fstat(given[0]).st_mode)  # type: ignore[arg-type]
            done.append("sync folder" if folder else name)
            return original(*given)  # type: ignore[operator]

        monkeypatch.setattr(durable, name, logged)
    return done


def test_a_whole_file_is_synced_before_its_name_and_the_name_after(tmp_path: Path, steps: list[str]) -> None:
    durable.write_whole(
        tmp_path / "file", (make(b) for make, b in ((bytes, b"one"), (bytearray, b"two"), (memoryview, b"three")))
    )
    assert (tmp_path / "file").read_bytes() == b"onetwothree"
    assert steps == ["unlink", "open_file", "put", "put", "put", "sync", "rename", "sync folder"]
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    durable.write_whole(tmp_path / "file", b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise OSError(errno.EIO, "no more")

    with pytest.raises(OSError, match="no more"):
        durable.write_whole(tmp_path / "file", pieces())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_killed_writer_left_is_in_nobodys_way(tmp_path: Path) -> None:
    durable.temporary_of(tmp_path / "file").write_bytes(b"much more than what is written now")
    durable.write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_writing_in_place_changes_no_more_than_it_says(tmp_path: Path, steps: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    durable.write_at(tmp_path / "file", b"67", 1)
    assert steps == ["open_file", "put", "sync"]
    assert (tmp_path / "file").read_bytes() == b"16745"
    with pytest.raises(FileNotFoundError):
        durable.write_at(tmp_path / "other", b"67")


def test_others_may_write_under_a_temporary_name(tmp_path: Path, steps: list[str]) -> None:
    with durable.replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"by somebody else")
    assert (tmp_path / "file").read_bytes() == b"by somebody else"
    assert steps == ["sync", "rename", "sync folder"]
