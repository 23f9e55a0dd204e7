"""The built-in tasks: their data is what it should be, and no node learns them alone."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from p2pnode.errors import ConfigError
from p2pnode.task import Shard, make
from p2pnode.tasks import idx
from p2pnode.tasks.digits import TRAIN_SAMPLES, digits
from p2pnode.tasks.idx import idx_file, read_idx
from p2pnode.tasks.images import fashion_mnist_images, mnist_images

LABELS = "mnist/t10k-labels-idx1-ubyte.gz"


def packed(magic: bytes, dimensions: list[int], values: bytes) -> bytes:
    content = magic + b"".join(d.to_bytes(4, "big") for d in dimensions) + values
    return gzip.compress(content, mtime=0)  # without the time: test names hold these bytes


def test_digits_are_whole_and_split_evenly() -> None:
    task = digits(Shard())
    assert len(task.train_data[0]) == TRAIN_SAMPLES
    assert len(task.test_data[0]) == 360
    assert task.test_data[1].bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    everything = torch.cat([task.train_data[0], task.test_data[0]])
    assert len(everything.unique(dim=0)) == 1797  # nothing to test on is also trained on
    assert abs(float(task.train_data[0].mean())) < 0.01
    assert abs(float(task.train_data[0].std()) - 1) < 0.01


def test_shards_of_digits_are_disjoint_and_complete() -> None:
    shards = [digits(Shard(index, 4, 3, 0.3)).train_data[0] for index in range(4)]
    assert len(torch.cat(shards).unique(dim=0)) == TRAIN_SAMPLES
    assert digits(Shard(0, 4, 3, 0.3)).train_data[0].equal(shards[0])


def test_idx_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(packed(bytes([0, 0, 8, 2]), [2, 3], bytes(range(6))))
    assert read_idx(path, 2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (packed(bytes([0, 0, 8, 1]), [6], bytes(6)), "doesn't begin as 2-dimensional"),
        (packed(bytes([0, 0, 9, 2]), [2, 3], bytes(6)), "doesn't begin as 2-dimensional"),
        (packed(bytes([0, 0, 8, 2]), [2], b""), "doesn't begin as 2-dimensional"),
        (packed(bytes([0, 0, 8, 2]), [2, 3], bytes(5)), "should hold 6 values and holds 5"),
        (packed(bytes([0, 0, 8, 2]), [2, 3], bytes(7)), "should hold 6 values and holds more"),
        (packed(bytes([0, 0, 8, 2]), [1 << 31, 1 << 31], b""), "claims 4611686018427387904 bytes"),
        (packed(bytes([0, 0, 8, 2]), [2, 3], bytes(6))[:-9], "end-of-stream|CRC"),
        (b"not gzip at all", "[Nn]ot a gzipped file"),
        (b"", "doesn't begin"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        read_idx(path, 2)
    assert "\n" not in str(error.value)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real web server on loopback that holds the folder returned, in place of the real source; an empty cache."""
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=folder)  # type: ignore[arg-type]

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setitem(idx._SOURCES, "mnist", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("P2PNODE_DATA", raising=False)
        monkeypatch.setenv("no_proxy", "*")
        yield folder
        server.shutdown()
        thread.join()


def test_a_download_is_checked_and_kept(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7])
    (mirror / Path(LABELS).name).write_bytes(gzip.compress(content))
    monkeypatch.setitem(idx._CONTENT_SHA256, LABELS, hashlib.sha256(content).hexdigest())
    path = idx_file(LABELS)
    assert path == tmp_path / "cache" / "p2pnode" / LABELS
    assert read_idx(path, 1).tolist() == [5, 7]
    (mirror / path.name).unlink()
    assert idx_file(LABELS) == path  # from the cache
    own = tmp_path / "own" / LABELS
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    monkeypatch.setenv("P2PNODE_DATA", str(tmp_path / "own"))
    assert idx_file(LABELS) == own  # what the user names comes first


@pytest.mark.parametrize("served", [gzip.compress(b"something else", mtime=0), b"<html>not found</html>", None])
def test_a_wrong_download_is_not_kept(mirror: Path, tmp_path: Path, served: bytes | None) -> None:
    if served is not None:
        (mirror / Path(LABELS).name).write_bytes(served)
    with pytest.raises(ConfigError, match="name a folder that holds it in P2PNODE_DATA, or connect") as error:
        idx_file(LABELS)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache" / "p2pnode" / "mnist").iterdir()] == [".lock"]


def needs(name: str) -> None:
    """Skip unless the real files are at hand; a test never downloads them."""
    if not (Path(os.environ.get("P2PNODE_DATA", "")) / name).is_file():
        pytest.skip(f"needs {name} in P2PNODE_DATA")


def test_the_real_files_have_the_checksums_we_expect() -> None:
    for name, expected in idx._CONTENT_SHA256.items():
        needs(name)
        content = gzip.decompress(idx_file(name).read_bytes())
        assert hashlib.sha256(content).hexdigest() == expected, name


def test_fashion_mnist() -> None:
    needs("fashion-mnist/train-images-idx3-ubyte.gz")
    images = fashion_mnist_images()
    assert images.train_images.shape == (60_000, 784)
    assert images.test_images.shape == (10_000, 784)
    assert images.train_labels.bincount().tolist() == [6000] * 10
    assert abs(float(images.train_images.mean())) < 1e-3
    assert abs(float(images.train_images.std()) - 1) < 1e-3
    first, second = (make("fashion-mnist", Shard(index, 2, 0, 0.3), 1) for index in (0, 1))
    assert len(first.train_data[0]) + len(second.train_data[0]) == 60_000
    assert first.test_data[0] is second.test_data[0]  # many nodes of a simulation share them


def test_mnist_is_the_test_file_divided() -> None:
    needs("mnist/t10k-images-idx3-ubyte.gz")
    images = mnist_images()
    assert images.train_images.shape == (8000, 784)
    assert images.test_images.shape == (2000, 784)
    assert images.test_labels.bincount().min() > 150
    assert len(make("mnist", Shard(1, 4, 0, 0.3), 1).test_data[0]) == 2000
