"""How entries reach everybody: pushed along a tree that each author's runs find for themselves, compared by anti-entropy behind.

Owns what is pushed to whom, and the talk in which two active peers find out that they have not the same:

- **Push.** A run that is new here goes on to every active peer that isn't known to have it. A copy that comes second is
  answered with `Prune`: that link is lazy for this author from then on, both ways. What remains is a tree for each author
  (Plumtree).
- **Standing.** When a peer becomes active, and now and then while something changes, each says the digest of its ledger. Where
  they differ, whoever has more entries says how many of each author (`Vector`), and the other says where it is ahead, and asks
  for what it lacks (`asking`). Either may cost an eighth of the bytes of entries on a link, or one each `vector_s`.
- **Repair.** A run that leaves a gap is asked for at once. When a link goes down, the authors whose news it brought
  are asked of others, who push them from then on; who is fed by nobody asks for everything (`graft`). A new link between two who
  are fed begins lazy.

Must never push faster than a peer may be talked to: what is over goes unsaid, and is asked for. A fork, a proof and the
comparison of states travel along. Sources: Leitão, Pereira, Rodrigues 2007 (Plumtree: Epidemic Broadcast Trees); Demers et al.
1987 (anti-entropy).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace

from protocols.comparison import Compared
from protocols.effects import Kind
from protocols.entries import Row, Run
from protocols.identity import PeerId, peer_text
from protocols.ledger import Ledger
from protocols.limits import Limits
from protocols.messages import Equivocation, Part, Prune, Runs, Standing, Vector
from protocols.scalar_frames import ROWS_MAX, RUNS_HEADER_BYTES, run_bytes, runs_frames
from protocols.sides import Side
from protocols.turn import Turn

FRAME_OVERHEAD_BYTES = 40  # of a frame on the wire, about: Noise, yamux, TCP and IP
ROW_BYTES = 44
STANDING_BYTES = 73 + FRAME_OVERHEAD_BYTES
PRINTS_KEPT = 16  # of our own hashes, to compare with those of peers who are a little ahead or behind (guess)
PRUNE_AGAIN_S = 5.0  # a prune that was lost is said again (guess)
BRISK_S = 1.0  # between two standings while nobody measures: people wait for nodes to agree


class Spreading:
    """The talk of one node about its ledger. `sides`: by active peer."""

    def __init__(self, ledger: Ledger, me: PeerId, limits: Limits, sides: Mapping[PeerId, Side]) -> None:
        self._own = ledger.tag(me)
        self._ledger, self._limits, self._sides = ledger, limits, sides
        self._parents: dict[PeerId, PeerId] = {}  # who pushed an author's newest run to us first
        self._prints: deque[tuple[bytes, bytes]] = deque(maxlen=PRINTS_KEPT)
        self._strange: tuple[PeerId, bytes] | None = None  # whose other state was reported last, and of which ledger
        self.brisk = False  # nobody measures: say at once how things stand
        self.news = self.copies = self.diverged = 0  # runs that were new; that came a second time; other states seen

    # --- pushing ----------------------------------------------------------------------------------------------------------

    def pass_on(self, run: Run, source: Side | None) -> None:
        """`run` is new here: push it to whoever may lack it, when the turn ends."""
        self.news += 1
        tag, end = self._ledger.tag(run.author), run.first + run.count
        for side in self._sides.values():
            if side is not source and side.theirs.get(tag, 0) < end and tag not in side.lazy:
                side.out.append(run)

    def greet(self, side: Side) -> None:
        """A peer has become active. Whoever is fed by nobody asks it to push."""
        side.hurry = True
        side.graft = not any(other.fed for other in self._sides.values())

    def came(self, side: Side, run: Run, part: Part, *, new: bool, turn: Turn) -> None:
        """`side` has sent this run, which was new here or not."""
        tag, ours = self._ledger.tag(run.author), self.count(run.author)
        side.entry_bytes += run_bytes(run)
        if run.author not in self._ledger.voided:
            side.notes(tag, run.first + run.count, ours, self._limits)
        if part is not Part.NEWS:
            return
        peer = side.link.peer
        if new:
            self._parents[run.author] = peer
            side.fed = True
            side.pruned.pop(tag, None)
        elif run.first + run.count <= ours:
            self.copies += 1
            if self._parents.get(run.author, peer) != peer and turn.now >= side.pruned.get(tag, float("-inf")) + PRUNE_AGAIN_S:
                side.pruned[tag] = turn.now
                side.lazy[tag] = side.to_prune[tag] = None

    def on_prune(self, side: Side, tags: Iterable[bytes]) -> None:
        """It gets these authors' runs from others sooner."""
        for tag in tags:
            if self._ledger.author_of(tag) is not None:
                side.lazy[tag] = None

    def flush(self, turn: Turn) -> None:
        """Send what this turn has brought for each."""
        for side in self._sides.values():
            tags, side.to_prune = tuple(side.to_prune), {}
            for at in range(0, len(tags), self._limits.ask_items_max):
                turn.send(side.link.peer, Prune(tags[at : at + self._limits.ask_items_max]))
            runs, side.out = side.out, []
            for group in runs_frames(runs, self._limits):
                if not side.pushes.take(turn.now):
                    break
                self.send_runs(side, Runs(group, Part.NEWS), turn)

    def send_runs(self, side: Side, runs: Runs, turn: Turn) -> None:
        """Runs for one peer, and what they mean for what it has."""
        turn.send(side.link.peer, runs)
        side.entry_bytes += RUNS_HEADER_BYTES + FRAME_OVERHEAD_BYTES + sum(map(run_bytes, runs.runs))
        for run in runs.runs:
            tag = self._ledger.tag(run.author)
            side.notes(tag, run.first + run.count, self.count(run.author), self._limits)

    def count(self, author: PeerId) -> int:
        """How many signed entries of `author` are here."""
        row = self._ledger.row(author)
        return 0 if row is None else row.count

    # --- how things stand -------------------------------------------------------------------------------------------------

    def printed(self, ledger: bytes, state: bytes) -> None:
        """The sum was hashed when the ledger's digest was `ledger`."""
        self._prints.append((ledger, state))

    def _standing(self) -> Standing:
        ledger, state = self._prints[-1] if self._prints else (bytes(16), bytes(16))
        return Standing(self._ledger.digest, self._ledger.entries, self._ledger.proofs_digest, ledger, state, graft=False)

    def _due(self, side: Side, standing: Standing) -> float:
        """When `side` is to be told how things stand here."""
        heard = side.heard
        if side.hurry:
            return float("-inf")
        if side.said == standing and heard is not None and (heard.ledger, heard.proofs) == (standing.ledger, standing.proofs):
            return float("inf")
        if self.brisk:
            return side.said_at + BRISK_S
        paid = side.entry_bytes * self._limits.vector_share >= STANDING_BYTES or not side.compared
        return side.said_at + (self._limits.standing_s if paid else self._limits.vector_s)

    def tick(self, turn: Turn) -> None:
        """Say how things stand, to whom it is time."""
        standing = self._standing()
        for side in self._sides.values():
            if turn.now >= self._due(side, standing):
                turn.send(side.link.peer, replace(standing, graft=side.graft))
                side.said, side.said_at = standing, turn.now
                side.entry_bytes = max(0.0, side.entry_bytes - STANDING_BYTES / self._limits.vector_share)
                side.hurry = side.graft = False

    @property
    def deadline(self) -> float:
        """When `tick` has something to do at the earliest."""
        standing = self._standing()
        return min((self._due(side, standing) for side in self._sides.values()), default=float("inf"))

    def lost(self, side: Side) -> None:
        """A peer is active no more. Of the authors whose news it brought, others shall: who gets them elsewhere than from us."""
        orphans = [author for author, peer in self._parents.items() if peer == side.link.peer]
        for place, author in enumerate(orphans):
            del self._parents[author]
            tag = self._ledger.tag(author)
            others = [other for other in self._sides.values() if tag in other.lazy]
            if others:
                others[place % len(others)].orphans[tag] = None
            else:
                for other in self._sides.values():
                    other.hurry = other.graft = True

    def on_standing(self, side: Side, standing: Standing, turn: Turn) -> None:
        """A peer says how things stand there."""
        first, side.heard = side.heard is None, standing
        if standing.graft:
            side.lazy.clear()
        elif first:
            side.lazy = dict.fromkeys(row.tag for row in self._ledger.rows() if row.tag != self._own)  # it is fed already
        self._compare_states(side, standing, turn)
        if standing.proofs != self._ledger.proofs_digest and side.proofs_given != standing.proofs:
            side.proofs_given = standing.proofs
            self._give_proofs(side, turn)
        if standing.ledger == self._ledger.digest:
            side.compared = True
            side.ahead.clear()
        elif standing.entries < self._ledger.entries or (
            standing.entries == self._ledger.entries and standing.ledger < self._ledger.digest
        ):
            self._say_all(side, turn)

    def _compare_states(self, side: Side, standing: Standing, turn: Turn) -> None:
        """The same ledger and another state is a fault in somebody's machine, and nobody can tell in whose."""
        if standing.printed == bytes(16):
            return
        for ledger, state in self._prints:
            found = (side.link.peer, ledger)
            if ledger == standing.printed and state != standing.state and found != self._strange:
                self._strange = found
                self.diverged += 1
                turn.report(Kind.DIVERGED, side.link.peer, "has another state for the same ledger")

    # --- vectors ----------------------------------------------------------------------------------------------------------

    def _say_all(self, side: Side, turn: Turn) -> None:
        """Say what we have of everybody, if entries on this link have paid for it, or the last time is long ago."""
        rows = self._ledger.rows()
        cost = (ROW_BYTES + FRAME_OVERHEAD_BYTES / ROWS_MAX) * len(rows) + FRAME_OVERHEAD_BYTES
        gap_s = min(BRISK_S * 5, self._limits.vector_s) if self.brisk else self._limits.vector_s
        if side.entry_bytes * self._limits.vector_share >= cost or turn.now >= side.vector_at + gap_s:
            side.vector_at, side.entry_bytes = turn.now, 0.0
            self.say(side, rows, turn, answer=False)

    def say(self, side: Side, rows: Iterable[Row], turn: Turn, *, answer: bool) -> None:
        """Say what we have of some."""
        left = tuple(rows)
        while True:
            some, left = left[:ROWS_MAX], left[ROWS_MAX:]
            turn.send(side.link.peer, Vector(some, bool(left), answer))
            if not left:
                return

    def on_vector(self, side: Side, vector: Vector, turn: Turn) -> bool:
        """A peer says what it has. Returns whether only its snapshot helps us."""
        below, ahead = False, []
        for row in vector.rows:
            found = self._ledger.compare(row)
            ours = 0 if found.author is None else self.count(found.author)
            match found.kind:
                case Compared.MISSING | Compared.UNKNOWN | Compared.SAME:
                    side.notes(row.tag, row.count, ours, self._limits)
                case Compared.FORKED:
                    if len(side.forked) < self._limits.ask_items_max:
                        side.forked.setdefault(row.tag, found.first)
                case Compared.BELOW:
                    below = True
                    if len(side.beyond) < self._limits.ledger_authors_max:
                        side.beyond[row.tag] = row.base
                case Compared.AHEAD:
                    side.notes(row.tag, min(row.count, ours), ours, self._limits)
                    ahead.append(row.tag)
        if vector.answer:
            side.compared = side.compared or not vector.more
        elif side.answers.take(turn.now):
            self._answer(side, vector, ahead, turn)
        return below

    def _answer(self, side: Side, vector: Vector, ahead: list[bytes], turn: Turn) -> None:
        """Say where we are ahead, and, when the last part is here, of whom the peer knows nothing."""
        side.named.update(dict.fromkeys(row.tag for row in vector.rows))
        if len(side.named) > 2 * self._limits.ledger_authors_max:
            side.named.clear()
        wanted = set(ahead)
        last = not vector.more
        rows = [row for row in self._ledger.rows() if row.tag in wanted or (last and row.tag not in side.named)]
        if last:
            side.named.clear()
            side.compared = True
        if rows or last:
            self.say(side, rows, turn, answer=True)

    # --- proofs -----------------------------------------------------------------------------------------------------------

    def _give_proofs(self, side: Side, turn: Turn) -> None:
        """Tell it whom we know to have been caught: as many as it may be told, beginning behind those of the last time."""
        proofs = self._ledger.proofs
        for _ in proofs:
            if not side.pushes.take(turn.now):
                return
            side.next_proof = (side.next_proof + 1) % len(proofs)
            turn.send(side.link.peer, Equivocation(proofs[side.next_proof]))

    def spread_proof(self, message: Equivocation, source: Side | None, turn: Turn) -> None:
        """Tell everybody who was caught; whoever can't be told now learns it when standings are compared."""
        author = message.proof.one.author
        turn.report(Kind.FORKED, author, f"{peer_text(author)} signed two things of one step: what follows is void")
        for side in self._sides.values():
            if side is not source and side.pushes.take(turn.now):
                turn.send(side.link.peer, message)
