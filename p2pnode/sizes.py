"""Sizes as people write them: "200 kB", "1.5MB", "2GiB".

Owns the units: SI (kB = 1,000 bytes) and IEC (KiB = 1,024), always bytes. Never guesses: a small b could mean bits, eight times
less, so it is refused with a sentence.
"""

from __future__ import annotations

import re
from fractions import Fraction

from p2pnode.errors import ConfigError

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kKmMgGtT]?)(i?)(B?)", re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_UNITS = ("B", "kB", "MB", "GB", "TB")
EXAMPLES = "write it like 200 kB, 1.5 MB or 2 GiB"


def parse_size(text: str, what: str = "size") -> int:
    """Bytes, at least one. `what` names the value in the ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        bits = " (a small b would be bits)" if re.fullmatch(r"[\d.]+\s*[kmgt]?i?b(it|ps)?(/s)?", text.strip(), re.I) else ""
        raise ConfigError(f"{what} is '{text}', which is no size in bytes{bits}; {EXAMPLES}")
    number, prefix, binary, _ = found.groups()
    size = int(Fraction(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])
    if size < 1:
        raise ConfigError(f"{what} is '{text}', which is less than a byte; {EXAMPLES}")
    return size


def parse_rate(text: str, what: str = "rate") -> int:
    """Bytes a second; "/s" may stand behind the size. Raises ConfigError."""
    return parse_size(text.strip().removesuffix("/s"), what)


def format_size(size: int) -> str:
    """About `size` bytes, in SI units and three digits: "1.5 MB"."""
    value = float(size)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
