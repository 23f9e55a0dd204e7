"""Directions and a state that must never change, in `directions.txt`: what a name stands for is made here, as all nodes make it.

A difference in an existing line means models that drift apart, not an update.
"""

from __future__ import annotations

from pathlib import Path

from protocols.identity import PeerId
from protocols.perturbation import direction_bits, direction_key

FILE = Path(__file__).with_name("directions.txt")
SWARM, AUTHOR = bytes(range(16)), PeerId(bytes(range(32)))
OTHER = PeerId(bytes(32))
STATE_PARAMETERS = 10_007
STATE_ENTRIES = 1_000


def keys() -> dict[str, bytes]:
    """Keys by what they are made of, with the edges of a step."""
    steps = (0, 1, 255, 256, 1 << 32, (1 << 64) - 1)
    made = {f"key {step}": direction_key(SWARM, AUTHOR, step) for step in steps}
    return made | {
        "key of another": direction_key(SWARM, OTHER, 1),
        "key elsewhere": direction_key(bytes(16), AUTHOR, 1),
    }


def bits() -> dict[str, bytes]:
    """Pieces of the direction of step 0: first parameter and count."""
    pieces = ((0, 256), (128, 128), (0, 13), (1 << 20, 64), (128 * ((1 << 32) - 1), 256), (1 << 40, 64))
    key = direction_key(SWARM, AUTHOR, 0)
    return {f"bits {first} {count}": direction_bits(key, first, count).tobytes() for first, count in pieces}


def entries() -> list[tuple[bytes, int]]:
    """1,000 entries of two authors, whose weights take all of int32."""
    found = []
    for step in range(STATE_ENTRIES // 2):
        for author in (AUTHOR, OTHER):
            weight = int.from_bytes(direction_key(bytes(16), author, step)[:4], "little", signed=True)
            found.append((direction_key(SWARM, author, step), weight >> step % 32))
    return found


def state_digest() -> bytes:
    """The digest of the sum of these entries over 10,007 parameters."""
    from protocols.sums import Sums

    sums = Sums(STATE_PARAMETERS)
    sums.add(entries())
    return sums.digest()


def write() -> None:
    """Write the file anew."""
    named = keys() | bits() | {"state": state_digest()}
    FILE.write_text("".join(f"{name}\t{value.hex()}\n" for name, value in named.items()), "utf-8")
