"""What the tests of carrying share: one core that has carried something, and a swarm whose nodes meet when the test says so."""

from __future__ import annotations

from protocols import effects as fx
from protocols import events as ev
from protocols.gossip import GossipSettings
from protocols.limits import LAPTOP
from protocols.merkle import Digest
from protocols.messages import Brought
from protocols.wire import Type
from tests.core_harness import Bench, Swarm, identity, make_core, offer_of

APART_S = LAPTOP.apart_s_min + 1


def together(*friends: int, **options: object) -> Bench:
    """A core with these active peers, which was apart from the others for a while at the start."""
    bench = Bench(**options)
    bench.tick()
    bench.befriend(*friends)
    return bench


def brought(bench: Bench, number: int, effects: list[fx.Effect] | None = None) -> list[Brought]:
    return [m for m in bench.said(number, effects) if isinstance(m, Brought)]


def fetch(bench: Bench, messenger: int, author: int, sequence: int = 1, age_s: int = 0) -> None:
    """A model of `author` comes from `messenger`, who carries it unless it is its own."""
    signed = offer_of(author, sequence)
    bench.say(messenger, signed if messenger == author else Brought(signed, age_s))
    bench.chunk(messenger, (author, sequence))


class Meetings(Swarm):
    """Nodes that know each other and meet only when the test says so. Each goes on learning alone meanwhile."""

    def __init__(self, nodes: int) -> None:
        gossip = GossipSettings(cycle_s=10.0)
        super().__init__({i: make_core(i, gossip=gossip, contacts=[j for j in range(nodes) if j != i]) for i in range(nodes)})
        self.trace = []
        self.apart = True
        self.pair: frozenset[int] = frozenset()

    def _dial(self, number: int, peer: object, addresses: tuple[str, ...]) -> None:
        other = int(addresses[0].split("/")[2])
        if frozenset((number, other)) == self.pair:
            super()._dial(number, identity(other).peer, addresses)
        else:
            self.at(self.now + 0.01, number, ev.DialFailed(identity(other).peer, addresses, "out of reach"))

    def meet(self, one: int, other: int, for_s: float = 40.0) -> None:
        """The two are in each other's reach for so long, then nobody is in anybody's."""
        self.pair = frozenset((one, other))
        self.run(for_s)
        assert self._links, "they found each other"
        self.pair = frozenset()
        self.cut(one, other)
        self.run(1.0)
        assert not self._links

    def merged(self, number: int) -> set[Digest]:
        """All that went into merges of this node."""
        return {i.digest for _, who, e in self.trace or () if who == number and isinstance(e, fx.Merge) for i in e.inputs}

    def made(self, number: int) -> set[Digest]:
        """All models that this node has published."""
        return {e.digest for _, who, e in self.trace or () if who == number and isinstance(e, fx.Store)}

    def brought(self, number: int | None = None) -> int:
        """Offers of carried models that were sent, in all or by one node."""
        sent = [e.data for _, who, e in self.trace or () if isinstance(e, fx.Send) and number in (None, who)]
        return sum(data[1] == Type.BROUGHT for data in sent)
