"""Files of public data: found on this machine, or fetched once, checked and kept.

Owns where data lives: the folder named by `P2PNODE_DATA`, then a cache, then the internet. It must never believe a file that came
over the network before its SHA-256 fits, nor leave half of one under a name that somebody reads.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import logging
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from p2pnode.errors import ConfigError

log = logging.getLogger(__name__)

CONTENT_BYTES_MAX = 64 << 20  # the largest, Fashion-MNIST's training images, has 47 MB
DOWNLOAD_BYTES_MAX = 64 << 20  # packed it has 26 MB
DOWNLOAD_GAP_S_MAX = 20.0  # no byte for so long and the source counts as down (guess)


def local_file(name: str, url: str, sha256: str, *, packed: bool) -> Path:
    """The file `name` (such as `mnist/t10k-labels-idx1-ubyte.gz`) on this machine, downloaded from `url` if need be.

    `sha256` is of the content: what gzip unpacks from it where `packed`, since mirrors pack the same content anew. Raises
    ConfigError, one sentence that says what to do, when it is neither here nor to be had.
    """
    if given := os.environ.get("P2PNODE_DATA"):
        path = Path(given) / name
        if path.is_file():
            return path
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2pnode" / name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # nodes that start together fetch it once
            if not path.is_file():
                _download(url, path, sha256, packed)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise ConfigError(
            f"{name} isn't on this machine and can't be downloaded ({error}); "
            "name a folder that holds it in P2PNODE_DATA, or connect to the internet once."
        ) from None
    return path


def _download(url: str, path: Path, sha256: str, packed: bool) -> None:
    """Fetch to a temporary file, check, rename. Raises OSError, also for a checksum that doesn't fit."""
    log.info("downloading %s", url)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part") as temporary:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_GAP_S_MAX) as response:  # noqa: S310 - from our own tables
            size = 0
            while piece := response.read(1 << 16):
                size += len(piece)
                if size > DOWNLOAD_BYTES_MAX:
                    raise OSError(f"{url} is larger than {DOWNLOAD_BYTES_MAX} bytes")
                temporary.write(piece)
        temporary.flush()
        with gzip.open(temporary.name) if packed else open(temporary.name, "rb") as content:
            found = hashlib.sha256(content.read(CONTENT_BYTES_MAX)).hexdigest()
        if found != sha256:
            raise OSError(f"{url} has content with SHA-256 {found[:16]}… instead of {sha256[:16]}…")
        os.link(temporary.name, path)
