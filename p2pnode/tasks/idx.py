"""IDX files, the format of MNIST and its kin: which there are, and how one is read strictly.

Owns the format and the table of sources. It must never read more of a file than its header promises.

Format: magic 0, 0, 8 (unsigned bytes), number of dimensions; each dimension as 4 bytes big-endian; the values (LeCun's MNIST
page). Files come gzipped. Checksums are of the unpacked content, since mirrors and distributions pack the same content anew.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2pnode.errors import ConfigError
from p2pnode.tasks.downloads import CONTENT_BYTES_MAX, local_file

Bytes = NDArray[np.uint8]

_SOURCES = {
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",  # the mirror that torchvision uses; the original site is closed
}
_CONTENT_SHA256 = {
    "fashion-mnist/train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "mnist/t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def idx_file(name: str) -> Path:
    """The file `name` (such as `mnist/t10k-labels-idx1-ubyte.gz`) on this machine, downloaded if need be.

    Raises ConfigError, one sentence that says what to do, when it is neither here nor to be had.
    """
    url = _SOURCES[name.partition("/")[0]] + name.rpartition("/")[2]
    return local_file(name, url, _CONTENT_SHA256[name], packed=True)


def read_idx(path: Path, dimensions: int) -> Bytes:
    """The array of unsigned bytes in a gzipped IDX file. Raises ConfigError when the file is anything else."""
    try:
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) != 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(f"it doesn't begin as {dimensions}-dimensional bytes do")
            shape = [int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4)]
            size = math.prod(shape)
            if size > CONTENT_BYTES_MAX:
                raise ValueError(f"it claims {size} bytes")
            values = file.read(size + 1)
            if len(values) != size:
                raise ValueError(f"it should hold {size} values and holds {'more' if len(values) > size else len(values)}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path} isn't a whole IDX file ({error}); delete it or put the right one there.") from None
    return np.frombuffer(values, np.uint8).reshape(shape)
