"""Directions: ±1 for each parameter, the same bits on every machine, from (swarm, author, step) alone.

Owns how a key is made and what bits it stands for. Must never use a generator whose floats or order of drawing differ between
machines, and never make a direction of all parameters in anything wider than a bit. The key is a hash, so that nobody can choose
its direction; the bits are a counter-based keystream, so that any piece of a direction can be made alone.

Bit i of the AES-128-CTR keystream (first counter block 0, bits little-endian in each byte) belongs to parameter i; a 1 means +1,
a 0 means -1.

Sources: Rademacher directions, Spall, SPSA, IEEE TAC 37(3) 1992; the direction from a seed, MeZO, Malladi et al. 2023, arXiv
2305.17333; a counter-based generator for it, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. AES, where
the processor has instructions for it, makes 10 GB/s a core, ChaCha20 3, numpy's Philox 0.25.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray
from torch import Tensor

from protocols.identity import PeerId

KEY_BYTES = 16  # AES-128
ALIGNMENT = 128  # parameters; one counter block, so that a piece begins where a block does
CONTEXT = b"p2pnode/1 direction"
_SLACK = KEY_BYTES - 1  # bytes that older versions of `cryptography` want to find behind what they write


def direction_key(swarm: bytes, author: PeerId, step: int) -> bytes:
    """The 16-byte key of the direction that `author` probes at `step`. `swarm`: the swarm's 16-byte digest; 0 <= step < 2^64."""
    return sha256(CONTEXT + swarm + author + step.to_bytes(8, "big")).digest()[:KEY_BYTES]


def direction_bits(key: bytes, first: int, count: int) -> NDArray[np.uint8]:
    """The direction of parameters `first` to `first + count - 1`, eight a byte, little-endian; bits beyond the last are 0.

    Raises ValueError unless `first` is a multiple of 128.
    """
    bits = np.frombuffer(bytearray(_keystream(key, first).update(bytes(-(-count // 8)))), np.uint8)
    if count % 8:
        bits[-1] &= (1 << count % 8) - 1
    return bits


class Directions:
    """Several directions, read side by side from parameter 0 on; their ciphers are set up once, which takes 5 µs each."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._streams = [_keystream(key, 0).update_into for key in keys]

    def read(self, zeros: bytes, rows: Sequence[memoryview]) -> None:
        """Write the bits of the next `8 * len(zeros)` parameters to the start of each direction's row; more rows do no harm."""
        for stream, row in zip(self._streams, rows, strict=False):
            stream(zeros, row)


def rows_of_bits(count: int, size: int) -> tuple[NDArray[np.uint8], list[memoryview]]:
    """Room for `count` rows of `size` bytes, a multiple of 8: as an array (count, size), and as what `Directions.read` fills."""
    room = np.zeros((count, size + 64), np.uint8)  # 64: rows a power of two apart would fall into the same lines of the cache
    return room[:, :size], [row.data[: size + _SLACK] for row in room]


def ones(bits: NDArray[np.uint8], count: int, device: torch.device) -> Tensor:
    """Packed bits (…, bytes) as a uint8 tensor (…, count) of 0 and 1 on `device`; they travel there packed."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits, axis=-1, count=count, bitorder="little"))
    packed = torch.from_numpy(np.ascontiguousarray(bits)).to(device)
    return unpacked(packed)[..., :count]


def unpacked(packed: Tensor) -> Tensor:
    """A uint8 tensor (…, n) as 0 and 1, uint8 (…, 8n), by operations that every device has."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> places & 1).flatten(-2)


def perturbed(values: Tensor, key: bytes, amount: int, first: int, count: int) -> Tensor:
    """`values[first : first + count] + amount * direction` as a new int32 tensor on the device of `values`, modulo 2^32.

    For a probe: a piece of the integer state, moved along a direction, without touching the state. Raises ValueError unless
    `first` is a multiple of 128.
    """
    plus = ones(direction_bits(key, first, count), count, values.device)
    return torch.add(values[first : first + count], plus, alpha=signed(2 * amount)).sub_(signed(amount))


def signed(weight: int) -> int:
    """`weight` modulo 2^32, as an int32 holds it."""
    return (weight + (1 << 31)) % (1 << 32) - (1 << 31)


def _keystream(key: bytes, first: int) -> CipherContext:
    if first % ALIGNMENT:
        raise ValueError(f"a piece of a direction begins at a multiple of {ALIGNMENT}, not at {first}")
    return Cipher(AES(key), CTR((first // ALIGNMENT).to_bytes(16, "big"))).encryptor()
