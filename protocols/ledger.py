"""Everybody's entries, as one node holds them: a grow-only set that is the same at all honest nodes once they have talked.

Owns the logs of all authors, our own among them, and the proofs against those who said two things of one step. Must never send,
wait or apply anything, nor believe what its author hasn't signed; whether to believe a snapshot is the caller's. Every fault of a
stranger is a RemoteError of whoever sent it.

What holds for any order, split, repetition and overlap of what is heard:

- A log is a contiguous prefix of an author's entries: what leaves a gap isn't taken. A payload that the code refuses is refused
  by everybody, whoever signed it, so an author who signs nonsense at some step has simply stopped there.
- Two ledgers with one `digest` have the same entries: it covers each author, count and head (16 bytes of a hash of all codes).
- What a `Change` says, what it takes back first, keeps the sum equal to the entries that are `spans_after({})`.

**Forks.** Two signed runs that differ at a step they share are a proof. It speaks for itself: it is believed from anybody
and passed on to all. With f the earliest step that any known proof disputes, the author's entries count up to

    max(256 * (f // 256), base)

and everything above is void for ever. The first term falls, by whole blocks (or an author could have us take back one entry a
million times), the second rises; minimum and maximum don't depend on the order in which they are heard. `base` is *our own* base:
what is below is in a snapshot, and can't be told apart. No word of a peer moves it, only a snapshot that we made or adopted; were
a peer's claim enough, a liar could raise one half of a swarm to one branch of a fork and the other half to the other, for good.
Who has compacted further than we have entries, or differs from us and has compacted further, has the snapshot that we need
(BELOW). So two nodes that know the same proofs and differ can tell from their rows who lacks what, and what is missing is runs
(MISSING), a snapshot (BELOW), or an earlier proof, which the runs of the other contain (FORKED).

That rests on cuts that don't contradict each other, which is for the caller to hold: of any two that honest nodes make, one has
at least as many entries of *every* author as the other. Two halves of a swarm that each cut alone would break this; `cuts` has
a cut take the word of more than half.

**Our own log.** Entries are there unsigned (`own`): in the sum, but in nothing that others see until they are signed (`sign`),
which the caller does once they are durable. If peers know more of our log than we do (our disk was rolled back), `compare` says
MISSING of our own row, and nothing should be measured until it doesn't: what we signed then wins over what we haven't signed yet.
A fork of our own is believed as anybody's.

Idea: version vectors of single-writer logs (Secure Scuttlebutt, Tarr et al. 2019); proofs of misbehaviour, PeerReview (Haeberlen
et al. 2007); causal stability (Baquero et al. 2014).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from protocols.codes import Code
from protocols.comparison import Comparison, compare
from protocols.entries import Mark, Proof, Row, Run, Span
from protocols.errors import RemoteError
from protocols.forks import check_run, disputed_step, sign_run, unpack_run
from protocols.identity import Identity, PeerId
from protocols.limits import Limits
from protocols.log import LOG_BYTES, RUN_BYTES, Log, Signed
from protocols.logs import Logs

DIGEST_BYTES = 16
OWN_SHARE = 1 / 16  # of the room for entries is kept for our own, which are never refused (guess)


@dataclass(frozen=True, slots=True)
class Change:
    """What something heard has changed: `retract` from the sum, then `add` to it; `runs` and `proof` are to be logged.

    `proof`: its author has just been found out (or found out to have lied earlier than known); it is to be passed on.
    """

    add: tuple[Span, ...] = ()
    retract: tuple[Span, ...] = ()
    proof: Proof | None = None
    runs: tuple[Run, ...] = ()


NOTHING = Change()


class Ledger:
    """The entries of all authors. Every method is quick: at most one signature is verified, or two for a proof."""

    def __init__(
        self,
        author: PeerId,
        scope: bytes,
        code: Code,
        limits: Limits,
        marks: Iterable[Mark] = (),
        runs: Iterable[Run] = (),
        proofs: Iterable[Proof] = (),
    ) -> None:
        """`author`: ourselves. `scope`: digests of swarm and schema, which signatures are bound to. The rest: what was logged.

        What comes from our own disk isn't verified again. Raises ValueError when it contradicts itself or the code.
        """
        self._own, self._scope, self._code, self._limits = author, scope, code, limits
        self._logs = Logs(scope, code.entry_bytes)
        self._proofs: dict[PeerId, Proof] = {}
        self._buckets: dict[PeerId, tuple[float, float]] = {}  # entries that may come, and when that was so
        self._restore(marks, runs, proofs)

    # --- what there is ------------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for all entries that are signed and count."""
        return self._logs.digest

    @property
    def entries(self) -> int:
        """How many those are, compacted ones too."""
        return self._logs.entries

    @property
    def held(self) -> int:
        """Bytes of memory that logs take, about."""
        return self._logs.held

    @property
    def authors(self) -> tuple[PeerId, ...]:
        """Whose entries are here, or who was caught."""
        return tuple(sorted(self._logs))

    @property
    def voided(self) -> tuple[PeerId, ...]:
        """Who was caught saying two things of one step."""
        return tuple(sorted(self._proofs))

    @property
    def proofs(self) -> tuple[Proof, ...]:
        """One proof for each author who was caught, sorted by author."""
        return tuple(self._proofs[author] for author in sorted(self._proofs))

    @property
    def proofs_digest(self) -> bytes:
        """16 bytes that stand for who was caught, and from where on: two nodes with the same needn't exchange proofs."""
        parts = (author + (self._logs[author].void or 0).to_bytes(8, "big") for author in sorted(self._proofs))
        return sha256(b"".join(parts)).digest()[:DIGEST_BYTES]

    @property
    def next_step(self) -> int:
        """The step of our next entry."""
        return self._logs[self._own].total if self._own in self._logs else 0

    @property
    def unsaid(self) -> int:
        """How many entries of ours aren't signed yet: they are in the sum, and in nothing else here."""
        return self._logs[self._own].total - self._logs[self._own].end if self._own in self._logs else 0

    def counts(self) -> dict[PeerId, int]:
        """How many entries of each author are signed and count."""
        return {author: log.count for author, log in self._logs.items() if log.count}

    def rows(self) -> tuple[Row, ...]:
        """What we have of each author, sorted by tag; none where nothing is."""
        return tuple(sorted((self._logs.row(log) for log in self._logs.values() if log.count), key=lambda row: row.tag))

    def row(self, author: PeerId) -> Row | None:
        """What we have of `author`; None: nothing."""
        log = self._logs.get(author)
        return self._logs.row(log) if log is not None and log.count else None

    def tag(self, author: PeerId) -> bytes:
        """What rows and questions call an author."""
        return self._logs.tag(author)

    def author_of(self, tag: bytes) -> PeerId | None:
        """Whom a tag names, as far as we know."""
        return self._logs.tags.get(tag)

    # --- what others say ----------------------------------------------------------------------------------------------------

    def add(self, run: Run, now: float) -> Change:
        """Take what is new in `run`, if it follows on what is here; nothing of it if it doesn't, comes too fast, or has no room.

        What is left out may be had later. Raises RemoteError for a run that no honest node would pass on.
        """
        codes = unpack_run(run, self._code, self._limits)
        log, last = self._logs.peek(run.author), run.first + run.count
        if run.first > log.end:
            return NOTHING
        step = log.difference(run.first, codes)
        if step is None and (last <= log.end or log.count == log.limit):
            return NOTHING
        if step is not None and log.knows(step):
            return NOTHING
        check_run(run, self._scope)
        if step is not None:
            return self._condemn(step, Proof(self._run(log, next(log.runs_from(step))), run))
        if not self._may_come(run.author, last - log.end, now):
            return NOTHING
        return self._extend(run, codes)

    def convict(self, proof: Proof) -> Change:
        """Believe a proof. Nothing, if we knew as much. Raises RemoteError if it proves nothing."""
        step, author = disputed_step(proof, self._code, self._limits), proof.one.author
        if self._logs.peek(author).knows(step):
            return NOTHING
        check_run(proof.one, self._scope)
        check_run(proof.other, self._scope)
        return self._condemn(step, proof) if self._has_room(author) else NOTHING

    def compare(self, row: Row) -> Comparison:
        """What a peer's row says, and what to do about it."""
        author = self.author_of(row.tag)
        return compare(None if author is None else self._logs[author], row)

    def runs_from(self, author: PeerId, first: int, bytes_max: int) -> tuple[Run, ...]:
        """The runs that hold `author`'s entries from step `first` on (or our base), one at least, in about `bytes_max` bytes.

        Void ones only where they share a run with valid ones. Nothing that isn't signed.
        """
        log = self._logs.get(author)
        runs: list[Run] = []
        if log is None or max(first, log.base) >= log.count:
            return ()
        for signed in log.runs_from(max(first, log.base)):
            run = self._run(log, signed)
            bytes_max -= len(run.payload) + len(run.signature)
            if runs and bytes_max < 0:
                break
            runs.append(run)
        return tuple(runs)

    def spans_after(self, counts: Mapping[PeerId, int]) -> tuple[Span, ...]:
        """All entries that are in the sum above these counts (0 for who isn't named) and above our bases, unsaid ones too."""
        logs = (self._logs[author] for author in self.authors)
        return tuple(span for log in logs for span in log.span(max(counts.get(log.author, 0), log.base), log.valid))

    # --- what we say --------------------------------------------------------------------------------------------------------

    def own(self, first: int, codes: bytes) -> Change:
        """Entries of ours that were measured, and are in the sum: to be logged, then signed.

        If their steps aren't the next ones any more (peers told us of our own entries meanwhile, or proved us a liar), they are
        taken back, and what stands there instead is added.
        """
        log = self._logs.enter(self._own)
        if first != log.total or log.void is not None:
            back = (Span(self._own, first, codes),) if codes else ()
            return Change(log.span(min(max(first, log.base), log.valid), log.valid), back)
        if not codes:
            return NOTHING
        with self._logs.changing(self._own):
            log.append(codes)
        width, most = self._code.entry_bytes, self._limits.run_entries_max
        pieces = [codes[at : at + most * width] for at in range(0, len(codes), most * width)]
        firsts = range(first, log.total, most)
        runs = (
            Run(self._own, at, len(piece) // width, self._code.pack(piece), b"") for at, piece in zip(firsts, pieces, strict=True)
        )
        return Change(runs=tuple(runs))

    def sign(self, identity: Identity, upto: int, entries_max: int) -> tuple[Run, ...]:
        """Sign our entries before step `upto`, all durable, in runs of at most `entries_max`: to be logged and said."""
        log = self._logs.get(self._own)
        runs: list[Run] = []
        while log is not None and log.void is None and log.end < min(upto, log.total):
            first, last = log.end, min(upto, log.total, log.end + min(entries_max, self._limits.run_entries_max))
            codes = log.codes(first, last)
            run = sign_run(identity, self._scope, first, last - first, self._code.pack(codes))
            with self._logs.changing(self._own):
                log.extend(first, codes, run.signature)
            runs.append(run)
        return tuple(runs)

    # --- cuts ---------------------------------------------------------------------------------------------------------------

    def mark_at(self, author: PeerId, count: int) -> Mark:
        """The mark of `author` after `count` entries, a multiple of 256. ValueError unless we have it above our base."""
        return self._logs.mark_at(author, count)

    def head_at(self, author: PeerId, count: int) -> bytes | None:
        """The head (16 bytes) of `author`'s first `count` entries; None where we can't tell."""
        log = self._logs.get(author)
        return log.head(count) if log is not None and log.base <= count <= log.count else None

    def cut_at(self, counts: Mapping[PeerId, int]) -> tuple[Mark, ...]:
        """The cut at these counts, sorted by author; our base where none or a lower one is named. ValueError as `mark_at`."""
        return self._logs.cut_at(counts)

    @property
    def cut(self) -> tuple[Mark, ...]:
        """Where we begin."""
        return self.cut_at({})

    def compact(self, cut: Iterable[Mark]) -> None:
        """Forget what is below `cut`: a durable snapshot holds it now. ValueError, and no change, for a cut of other entries.

        It may have become one since it was made, if a proof came meanwhile. Such a snapshot is to be thrown away.
        """
        self._logs.compact(tuple(cut))

    def refusal(self, cut: Iterable[Mark]) -> str:
        """Why a snapshot of this cut must not replace our sum, in a few words, or nothing. One behind ours would lose entries."""
        return self._logs.refusal(tuple(cut), self._limits.ledger_authors_max)

    def adopt(self, cut: Iterable[Mark]) -> Change:
        """The sum has been replaced by a snapshot's: begin at its cut. `add`: all that we have above it, our own unsaid ones too.

        What we have is kept, even where `cut` is of another log than ours. ValueError, and no change, for a cut with a `refusal`.
        """
        marks = tuple(cut)
        if reason := self.refusal(marks):
            raise ValueError(f"a snapshot that is {reason}")
        self._logs.adopt(marks)
        return Change(self.spans_after({}))

    # --- inside -------------------------------------------------------------------------------------------------------------

    def _run(self, log: Log, signed: Signed) -> Run:
        payload = self._code.pack(log.codes(signed.first, signed.last))
        return Run(log.author, signed.first, signed.last - signed.first, payload, signed.signature)

    def _has_room(self, author: PeerId) -> bool:
        return author in self._logs or len(self._logs) < self._limits.ledger_authors_max

    def _may_come(self, author: PeerId, fresh: int, now: float) -> bool:
        """Whether there is room for so many entries more, and they don't come too fast."""
        cost = LOG_BYTES * (author not in self._logs) + RUN_BYTES + fresh * self._code.entry_bytes
        if not self._has_room(author) or self.held + cost > self._limits.ledger_bytes_max * (1 - OWN_SHARE):
            return False
        tokens, at = self._buckets.get(author, (self._limits.entries_burst_max, now))
        tokens = min(tokens + max(now - at, 0.0) * self._limits.entries_per_s_max, self._limits.entries_burst_max)
        self._buckets[author] = (tokens - fresh if tokens >= fresh else tokens), now
        return tokens >= fresh

    def _extend(self, run: Run, codes: bytes) -> Change:
        """Take a run that is sound and follows on. Of our own entries, what was signed wins over what wasn't."""
        with self._logs.changing(run.author) as log:
            back, was = self._give_way(log, run, codes), log.valid
            log.extend(run.first, codes, run.signature)
            return Change(log.span(was, max(was, log.valid)), back, runs=(run,))

    def _give_way(self, log: Log, run: Run, codes: bytes) -> tuple[Span, ...]:
        """Forget unsaid entries of ours that differ from a signed run, and all after them."""
        step = log.conflict(run.first, codes)
        if step is None:
            return ()
        back = log.span(step, log.total)
        log.keep(step)
        return back

    def _condemn(self, step: int, proof: Proof) -> Change:
        with self._logs.changing(proof.one.author) as log:
            was = log.valid
            kept = log.codes(log.base, was)
            log.condemn(step)
            self._proofs[log.author] = proof
        gone = kept[(log.count - log.base) * self._code.entry_bytes :]
        return Change(retract=(Span(log.author, log.count, gone),) if gone else (), proof=proof)

    def _restore(self, marks: Iterable[Mark], runs: Iterable[Run], proofs: Iterable[Proof]) -> None:
        """Signed runs first, then our unsaid ones as far as they follow on; of others, what doesn't can be had again."""
        try:
            self.adopt(marks)
            for proof in proofs:
                self._condemn(disputed_step(proof, self._code, self._limits), proof)
            for run in sorted(runs, key=lambda run: (not run.signature, run.author, run.first, -run.count)):
                self._remember(run)
        except RemoteError as error:
            raise ValueError(f"the ledger that was kept doesn't fit this swarm: {error.reason}") from None

    def _remember(self, run: Run) -> None:
        """A run from our own disk."""
        codes, log = unpack_run(run, self._code, self._limits), self._logs.enter(run.author)
        last = run.first + run.count
        if not run.signature:
            if run.author != self._own:
                raise ValueError("a run of somebody else that isn't signed was kept")
            if log.void is None and run.first <= log.total < last and log.conflict(run.first, codes) is None:
                with self._logs.changing(run.author):
                    log.append(codes[(log.total - run.first) * self._code.entry_bytes :])
            return
        if run.author == self._own and run.first > log.end and log.void is None:
            raise ValueError(
                f"of our own entries, {log.end} to {run.first - 1} are missing; others must not be signed in their place"
            )
        step = log.difference(run.first, codes)
        if step is not None:
            self._condemn(step, Proof(self._run(log, next(log.runs_from(step))), run))
        elif run.first <= log.end < last and log.count < log.limit:
            self._extend(run, codes)
