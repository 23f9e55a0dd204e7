"""Who meets whom and when: a contact trace, read from a file, and what it makes of the network.

Owns the file's form: one contact a line, `time a b duration`, in seconds and node numbers; # begins a comment; any order. Two
nodes reach each other while they have a contact, and at no other time: nothing that is under way arrives, and nobody is told that
it is over. When one begins, both are told of each other's address, as by discovery in a local network. It must never reach for a
file but the one it is given.

Source of the form: traces of delay-tolerant networks (CRAWDAD's contact lists; the ONE simulator has its own, one line an end).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from simulations.errors import ScenarioError
from simulations.rules import DROP, PASS, Packet, Rule, Verdict

CONTACTS_MAX = 1_000_000  # lines of a trace


@dataclass(frozen=True, slots=True)
class Contact:
    """Nodes `one` and `other` reach each other from `start` for `duration` seconds."""

    start: float
    one: int
    other: int
    duration: float


def read_contacts(path: Path, nodes: int) -> list[Contact]:
    """The contacts of a trace, by start. Raises ScenarioError for a line that is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"contacts {path} can't be read: {error}; give a text file of lines 'time a b duration'.") from None
    contacts = []
    for number, line in enumerate(lines, 1):
        if words := line.partition("#")[0].split():
            contacts.append(_contact(words, nodes, f"line {number} of {path.name}"))
            if len(contacts) > CONTACTS_MAX:
                raise ScenarioError(f"{path.name} has more than {CONTACTS_MAX} contacts; take a part of it.")
    return sorted(contacts, key=lambda one: (one.start, one.one, one.other))


def _contact(words: list[str], nodes: int, where: str) -> Contact:
    try:
        start, one, other, duration = float(words[0]), int(words[1]), int(words[2]), float(words[3])
    except (ValueError, IndexError):
        raise ScenarioError(f"{where} is no contact; write time a b duration, such as 60 0 3 20.5.") from None
    if len(words) != 4:
        raise ScenarioError(f"{where} has {len(words)} words; write time a b duration, such as 60 0 3 20.5.")
    if not (math.isfinite(start) and math.isfinite(duration) and start >= 0 and duration > 0):
        raise ScenarioError(f"{where} needs a time from 0 on and a duration above 0.")
    if not (0 <= one < nodes and 0 <= other < nodes) or one == other:
        raise ScenarioError(
            f"{where} is of nodes {one} and {other}; give two different ones from 0 to {nodes - 1}, or set nodes."
        )
    return Contact(start, one, other, duration)


def only_contacts(contacts: list[Contact]) -> Rule:
    """Nothing passes but between two nodes that have a contact."""
    starts: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    ends: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for contact in contacts:
        pair = (min(contact.one, contact.other), max(contact.one, contact.other))
        starts[pair].append(contact.start)
        until = contact.start + contact.duration
        ends[pair].append(max(until, ends[pair][-1]) if ends[pair] else until)

    def rule(packet: Packet) -> Verdict:
        pair = (min(packet.source, packet.target), max(packet.source, packet.target))
        at = bisect_right(starts[pair], packet.now) if pair in starts else 0
        return PASS if at and packet.now < ends[pair][at - 1] else DROP

    return rule
