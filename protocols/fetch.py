"""One blob on its way in: which chunk is asked of whom.

Owns the book of a single fetch: chunks that are here, asked for, or still wanted, and for each source what it was asked for and
how fast it answers. Decides what to ask next; says nothing itself (`transfer` sends, verifies and blames).

Each source has a window of its own: what it delivers in about `window_s` and a round trip, `window_chunks` at most, so that a
fast source takes more and a slow one holds up little. After a broken link it begins with as many chunks as the last link held
out for: where links are short, whole windows would mostly be asked for in vain, and no peer serves us a model more than a few
times over.

How long a source may be silent follows what was measured of its link (`Line`), so that a dead one on a fast link is noticed in
seconds and a slow link has its time.

When no chunk is left to ask for, a source with nothing to do is asked again for half of what the worst straggler still owes
(*endgame*): a chunk is asked of two sources at most, and of a second only when the first makes us wait longer than `endgame_s`.

Idea: BitTorrent (pipelined requests; endgame mode, here with a measure of who is late); Bitswap's want lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from protocols.identity import PeerId
from protocols.limits import Limits
from protocols.merkle import Digest, chunk_count

RUNS_MAX = 4  # wants sent to one source at a time: holes cost a want each, and a server keeps few that wait
PACE_WEIGHT = 0.25  # of the newest chunk in a source's pace (guess: four chunks, 1 MiB, tell)
FORGET = 0.98  # of the longest silence, with each chunk: halved in 34 (guess)
WITHHELD = 4  # a source may deliver other blobs for so many times its patience before this one
_WANTED, _ASKED, _HERE = range(3)


@dataclass(slots=True)
class Line:
    """How one peer delivers, over all fetches. Times are seconds.

    `heard`: when a chunk came last, or one was asked for when none was owed; `owes`: chunks asked for that may still come;
    `chunk_s`: between two chunks while it owed some, smoothed; `worst_s`: the longest such time, forgotten slowly.
    """

    heard: float
    owes: int = 0
    chunk_s: float | None = None
    worst_s: float = 0.0
    round_trip_s: float = 0.0

    def delivers(self, now: float) -> None:
        """A chunk that it owed has come."""
        took_s = now - self.heard
        self.chunk_s = took_s if self.chunk_s is None else self.chunk_s + PACE_WEIGHT * (took_s - self.chunk_s)
        self.worst_s = max(took_s, self.worst_s * FORGET)
        self.heard = now
        self.owes -= 1

    def patience_s(self, limits: Limits) -> float:
        """How long it may be silent while it owes chunks: a few times what it takes, within bounds that follow the link too."""
        if self.chunk_s is None:
            return limits.chunk_gap_s_max
        enough_s = max(limits.chunk_gap_s_min, 4 * self.worst_s, 8 * self.chunk_s + 4 * self.round_trip_s)
        return min(enough_s, max(limits.chunk_gap_s_max, 4 * self.chunk_s))


@dataclass(slots=True)
class Source:
    """Who delivers. `heard`: when it last did, or was first asked (seconds); `pace_s`: seconds a chunk, smoothed."""

    heard: float
    line: Line
    asked: set[int] = field(default_factory=set)  # and not here yet
    late: int = 0  # chunks that it was asked for and another has delivered since; they will come all the same
    asked_ever: int = 0
    ahead: int = 0  # chunks of other blobs that its line owed when it was last heard: they may all come first
    pace_s: float | None = None
    delivered: int = 0  # since its link came up
    cap: int | None = None  # after a broken link: how many it had delivered until then

    def delivers(self, now: float) -> None:
        """A chunk has come."""
        self.line.delivers(now)
        self.ahead = self.line.owes
        self.delivered += 1
        took_s = now - self.heard
        self.pace_s = took_s if self.pace_s is None else self.pace_s + PACE_WEIGHT * (took_s - self.pace_s)
        self.heard = now

    @property
    def owes(self) -> int:
        """Chunks on their way from it."""
        return len(self.asked) + self.late

    @property
    def debt_s(self) -> float:
        """How long those will take, at its pace."""
        return self.owes * (self.pace_s or 0.0)


class Fetch:
    """The book of one blob of `size` bytes. `stale`: when it is of no use any more; `begun`: when it got its place (seconds)."""

    __slots__ = (
        "_limits", "_quota", "_states", "again", "begun", "chunks", "digest", "former", "here", "size", "sources", "stale",
    )  # fmt: skip

    def __init__(self, digest: Digest, size: int, stale: float, begun: float, limits: Limits) -> None:
        self.digest, self.size, self.stale, self.begun, self._limits = digest, size, stale, begun, limits
        self.chunks = chunk_count(size)
        self.here = self.again = 0  # chunks that are here; that were asked of a second source
        self.sources: dict[PeerId, Source] = {}
        self.former: dict[PeerId, Source] = {}  # whose links broke: they may come back
        self._states = bytearray(self.chunks)
        self._quota = self.chunks * limits.serve_factor_max  # more of it no peer serves us

    @property
    def whole(self) -> bool:
        """Whether every chunk is here."""
        return self.here == self.chunks

    @property
    def until(self) -> float:
        """When it is given up, if it stays in progress (seconds)."""
        return min(self.stale, self.begun + self._limits.fetch_s_max)

    @property
    def verified(self) -> tuple[int, ...]:
        """Which chunks are here."""
        return tuple(index for index, state in enumerate(self._states) if state == _HERE)

    def restore(self, chunks: Iterable[int]) -> None:
        """These are here; one is fetched again when that would be all, so that the fetch ends like any other."""
        for index in list(chunks)[: self.chunks - 1]:
            self._states[index] = _HERE
        self.here = self._states.count(_HERE)

    # --- sources ------------------------------------------------------------------------------------------------------

    def join(self, peer: PeerId, now: float, line: Line) -> None:
        """`peer` has the blob."""
        if peer not in self.sources:
            source = self.former.pop(peer, None) or Source(now, line)
            source.line = line
            if source.asked_ever < self._quota:
                self.sources[peer] = source

    def part(self, peer: PeerId, *, may_return: bool) -> int:
        """`peer` delivers no more. Returns how many chunks it still owed."""
        source = self.sources.pop(peer, None)
        if source is None:
            if not may_return:
                self.former.pop(peer, None)
            return 0
        owes, owed = source.owes, source.asked
        source.asked, source.late = set(), 0
        source.line.owes -= owes
        for index in owed:
            if not any(index in other.asked for other in self.sources.values()):
                self._states[index] = _WANTED
        if may_return:
            self.former[peer] = source
            if len(self.former) > self._limits.links_max:
                del self.former[next(iter(self.former))]
        return owes

    def broken(self, peer: PeerId) -> None:
        """The link to `peer` is gone, and all that was under way on it."""
        source = self.sources[peer]
        if source.asked:
            source.cap = max(1, source.delivered)
        source.delivered = 0
        self.part(peer, may_return=True)

    def used_up(self) -> list[PeerId]:
        """Sources that have been asked for as much as a peer may ask for."""
        return [peer for peer, one in self.sources.items() if not one.owes and one.asked_ever >= self._quota]

    def silent(self, now: float) -> list[PeerId]:
        """Sources that were asked and haven't delivered for too long."""
        return [peer for peer, one in self.sources.items() if one.owes and now >= self._patience_ends(one)]

    def _patience_ends(self, source: Source) -> float:
        """When a source that owes chunks has been silent for too long: on its line, or here while it delivers others."""
        patience_s = source.line.patience_s(self._limits)
        queue_s = 2 * source.ahead * (source.line.chunk_s or 0.0)
        here_s = WITHHELD * max(patience_s, self._limits.chunk_gap_s_max) + queue_s
        return min(max(source.heard, source.line.heard) + patience_s, source.heard + here_s)

    # --- chunks -------------------------------------------------------------------------------------------------------

    def take(self, peer: PeerId, index: int, now: float) -> None:
        """Chunk `index` is here, from `peer`; whoever else was asked for it will send it too late."""
        self.sources[peer].delivers(now)
        self.sources[peer].asked.remove(index)
        self._keep(index)

    def wants(self, index: int) -> bool:
        """Whether chunk `index` exists and isn't here."""
        return index < self.chunks and self._states[index] != _HERE

    def take_belated(self, index: int) -> None:
        """Chunk `index` is here, from somebody who isn't waited for any more."""
        self._keep(index)

    def _keep(self, index: int) -> None:
        self._states[index] = _HERE
        self.here += 1
        for source in self.sources.values():
            if index in source.asked:
                source.asked.remove(index)
                source.late += 1

    def take_late(self, peer: PeerId, now: float) -> bool:
        """A chunk that isn't waited for any more has come from `peer`. False when none was to come."""
        source = self.sources.get(peer)
        if source is None or not source.late:
            return False
        source.late -= 1
        source.delivers(now)
        return True

    def ask(self, peer: PeerId, now: float) -> list[tuple[int, int]]:
        """What to ask `peer` for now, as runs of chunks (first, count); they count as asked."""
        source = self.sources[peer]
        window = self._window(source)
        if source.owes > window // 2:
            return []
        room = min(window - source.owes, self._quota - source.asked_ever)
        runs: list[tuple[int, int]] = []
        while room > 0 and len(runs) < RUNS_MAX and (first := self._states.find(_WANTED)) >= 0:
            runs.append(self._asked(source, first, self._run(first, room), now))
            room -= runs[-1][1]
        if not source.owes and room > 0:
            due, straggling = self._rescue(source)
            if now >= due:
                runs = [self._asked(source, first, count, now) for first, count in _runs(straggling[-room:])]
                self.again += len(source.asked)
        return runs

    @property
    def deadline(self) -> float:
        """When a source has been silent for too long, makes an idle one take over, or the time is over (seconds)."""
        times = [self._patience_ends(one) for one in self.sources.values() if one.owes]
        times += [self._rescue(one)[0] for one in self.sources.values() if not one.owes]
        return min([self.until, *times])

    # --- inside -------------------------------------------------------------------------------------------------------

    def _window(self, source: Source) -> int:
        most = self._limits.window_chunks
        if source.cap is not None:
            most = min(most, max(source.cap, source.delivered))
        alone = len(self.sources) == 1
        if source.pace_s is None:
            return most if alone else max(1, most // 4)
        ahead_s = self._limits.window_s + source.line.round_trip_s
        least = min(2, most) if alone else 1  # the next is under way while one arrives
        return most if source.pace_s * most <= ahead_s else max(least, int(ahead_s / source.pace_s))

    def _run(self, first: int, room: int) -> int:
        end = first + 1
        while end < self.chunks and end - first < room and self._states[end] == _WANTED:
            end += 1
        return end - first

    def _asked(self, source: Source, first: int, count: int, now: float) -> tuple[int, int]:
        if not source.owes:
            source.heard, source.ahead = now, source.line.owes
        if not source.line.owes:
            source.line.heard = now
        source.line.owes += count
        source.asked.update(range(first, first + count))
        source.asked_ever += count
        self._states[first : first + count] = bytes([_ASKED]) * count
        return first, count

    def _rescue(self, idle: Source) -> tuple[float, list[int]]:
        """When `idle` should help out the worst straggler, and with which chunks: the last half of those only that one owes.

        At once when it takes twice as long as `idle` for a chunk, else when it was silent: help means that chunks come twice.
        """
        patience_s = max(self._limits.endgame_s, 2 * (idle.pace_s or 0.0))
        best: tuple[float, list[int]] = (float("inf"), [])
        for source in self.sources.values():
            owed = [index for index in sorted(source.asked) if self._owners(index) == 1]
            slow = idle.pace_s is not None and source.pace_s is not None and source.pace_s > 2 * idle.pace_s
            due = source.heard if slow and source.debt_s > patience_s else source.heard + patience_s
            if owed and due < best[0]:
                best = due, owed[len(owed) // 2 :]
        return best

    def _owners(self, index: int) -> int:
        return sum(1 for source in self.sources.values() if index in source.asked)


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Sorted indices as runs (first, count); the last few if there are too many."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and sum(runs[-1]) == index:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((index, 1))
    return runs[-RUNS_MAX:]
