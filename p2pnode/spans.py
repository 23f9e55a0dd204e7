"""Entries on their way to the training process: spans as plain tuples, in parts that aren't too much at once.

Owns how spans are cut. Must never part an entry of several bytes, nor leave one out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from protocols.entries import Mark, Span
from protocols.identity import PeerId

Packed = tuple[PeerId, int, bytes]  # a span, as msgpack takes it

PART_BYTES_MAX = 1 << 14  # of entries in one request: minutes with a large model, and a crash repeats no more than that
PART_SPANS_MAX = 1 << 10  # in one request; each costs a look-up


def packed(spans: Iterable[Span]) -> list[Packed]:
    """Spans as they travel to the training process."""
    return [(span.author, span.first, span.codes) for span in spans]


def unpacked(spans: Iterable[Packed]) -> list[Span]:
    """And as they arrive there."""
    return [Span(author, first, codes) for author, first, codes in spans]


def in_parts(spans: Iterable[Span], size: int) -> Iterator[list[Packed]]:
    """The same entries, of `size` bytes each, in parts of at most PART_BYTES_MAX bytes and PART_SPANS_MAX spans."""
    part: list[Packed] = []
    room = PART_BYTES_MAX
    for span in spans:
        at = 0
        while at < len(span.codes):
            piece = span.codes[at : at + room // size * size]
            part.append((span.author, span.first + at // size, piece))
            at, room = at + len(piece), room - len(piece)
            if room < size or len(part) == PART_SPANS_MAX:
                yield part
                part, room = [], PART_BYTES_MAX
    if part:
        yield part


def ends(spans: Iterable[Span], size: int) -> dict[PeerId, int]:
    """How far the entries of each author reach."""
    found: dict[PeerId, int] = {}
    for span in spans:
        found[span.author] = max(found.get(span.author, 0), span.first + len(span.codes) // size)
    return found


def up_to(spans: Iterable[Span], cut: Sequence[Mark], tail: Sequence[Span], size: int) -> tuple[Span, ...]:
    """`spans` without what reaches beyond `cut` and the `tail` above it."""
    limits = {mark.author: mark.count for mark in cut} | ends(tail, size)
    kept = ((span, max(limits.get(span.author, 0) - span.first, 0) * size) for span in spans)
    return tuple(Span(span.author, span.first, span.codes[:length]) for span, length in kept if length)
