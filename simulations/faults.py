"""The scenario keys of misfortune: what goes wrong with nodes, links and disks, and when.

Owns names, ranges and meanings; `nemesis` and its neighbours carry them out. They are the first part of `scenario.Scenario`, in
a file of their own only because there are many. Everything is off by default. Where nothing else is said, faults last until
`heal_s` before the end, and who was down is up again then.
"""

from __future__ import annotations

from dataclasses import dataclass

from simulations.keys import one_of, within


@dataclass(frozen=True, slots=True)
class Faults:
    """Times in virtual seconds."""

    heal_s: float = within(0.0, 0, 1e6)  # faults end so long before the end
    grace_s: float = within(30.0, 0, 1e6)  # a node younger than this may be without peers

    # nodes that come and go
    leave_per_minute: float = within(0.0, 0, 100)  # share of the nodes
    join_per_minute: float = within(0.0, 0, 100)
    crash_share: float = within(0.5, 0, 1)  # of those who leave or fall asleep: vanish without a goodbye, links stay open
    return_s: float = within(0.0, 0, 1e6)  # who vanished comes back after half to one and a half times so long; 0: never

    # nodes that are off now and then, with what is on their disks; all begin on, bootstraps sleep as others do
    on_share: float = within(1.0, 0.01, 1)  # of the time that a node is on; 1: always
    on_s: float = within(60.0, 0.1, 1e6)  # how long it is on in the mean, each time drawn anew (exponentially); nights likewise …
    day_s: float = within(0.0, 0, 1e6)  # … or, above 0, on for `on_share` of each day of this length, by its own longitude

    battery_steps: int = within(0, 0, 10_000_000)  # a battery lasts for so many local steps or probes, then the node sleeps …
    charge_s: float = within(60.0, 2, 1e6)  # … for so long; 0 steps: nobody has one
    flash_crowd: int = within(0, 0, 5000)  # so many join at once …
    flash_s: float = within(0.0, 0, 1e6)  # … then

    # parts
    partition_s: float = within(0.0, 0, 1e6)  # from here on the nodes are in parts between which no frame passes …
    partition_for_s: float = within(0.0, 0, 1e6)  # … for so long; 0: no partition
    # halves · lopsided: a tenth and the rest · one: a node and the rest · one_way: halves, but what one says passes to the
    # other · bridge: halves, and one node that reaches both · flapping: halves, apart and together by turns
    partition_shape: str = one_of("halves", "lopsided", "one", "one_way", "bridge", "flapping")
    flap_s: float = within(10.0, 0.01, 1e6)  # flapping: how long each turn is

    # a file of lines `time a b duration` (simulations/contacts.py), beside the scenario or as the shell sees it: nodes reach each
    # other only then
    contacts: str = ""

    # islands: nodes in so many parts (by number, of equal size, newcomers in turn) that have never heard of each other. Each has
    # bootstraps of its own and, with same_init, a start of its own; all know all bootstraps
    islands: int = within(1, 1, 1000)
    islands_until_s: float = within(0.0, 0, 1e6)  # from here on the parts can reach each other; 0: never
    disjoint_classes: bool = False  # True: each island has classes of its own, those whose number mod islands is the island's

    # a disaster
    disaster_s: float = within(0.0, 0, 1e6)  # then part of the nodes vanish for good, bootstraps too
    loss_fraction: float = within(0.0, 0, 0.99)  # how many of those who are up; 0: no disaster
    disaster_victims: str = one_of("linked", "random")  # linked: those with the most links (of the graph, where one is given)
    # a given graph: false: its neighbours are all that a node ever has; true: they are the contacts it starts with
    repair: bool = False

    # links
    cuts_per_minute: float = within(0.0, 0, 10_000)  # that break, per node; both ends are told at once
    loss: float = within(0.0, 0, 1)  # share of frames that vanish: stricter than TCP, which would send them again

    duplicate: float = within(0.0, 0, 1)  # share of frames that arrive twice, the second time up to reorder_s later
    reorder: float = within(0.0, 0, 1)  # share of frames that are up to reorder_s late and are overtaken
    reorder_s: float = within(1.0, 0, 1e4)
    spike_per_minute: float = within(0.0, 0, 1000)  # of latency, per node …
    spike_s: float = within(0.5, 0, 1e4)  # … so much more, both ways …
    spike_for_s: float = within(5.0, 0, 1e6)  # … for so long
    # a random half is clogged one by one within clog_s and let go in another order within the next; what they say or are told
    # waits
    clog_per_minute: float = within(0.0, 0, 1000)
    clog_s: float = within(5.0, 0.001, 1e6)
    bandwidth_low: float = within(1.0, 0.0001, 1)  # each uplink's share of bandwidth_mbit is drawn between this and 1 …
    bandwidth_every_s: float = within(10.0, 0.01, 1e6)  # … every so often

    # machines, each of them so often a minute and each time for half to one and a half times so long
    pause_per_minute: float = within(0.0, 0, 1000)  # per node: frozen, with all that comes in waiting for it
    pause_s: float = within(5.0, 0, 1e6)
    crash_per_minute: float = within(0.0, 0, 1000)  # per node: the power fails in the midst of writing; bootstraps too
    crash_s: float = within(5.0, 0.001, 1e6)
    torn_share: float = within(0.2, 0, 1)  # of crashes: the newest checkpoint can't be read afterwards, the one before is used
    disk_full_per_minute: float = within(0.0, 0, 1000)  # per node: nothing gets written meanwhile
    disk_full_s: float = within(10.0, 0, 1e6)
    slow_share: float = within(0.0, 0, 1)  # of the nodes are grey: up, but slow at everything
    slow_factor: float = within(10.0, 1, 1e4)  # so many times slower at training
    slow_ms: float = within(0.0, 0, 1e6)  # and whatever they say or are told is so much later

    # liars
    equivocators: int = within(0, 0, 1000)  # the last so many of the first nodes sign different entries for different peers
    garblers: int = within(0, 0, 1000)  # and so many before them sign entries that are none, and send rubbish


def inconsistent(faults: Faults) -> str | None:
    """What doesn't go together, as a sentence that says what to do."""
    if faults.loss_fraction and not faults.disaster_s:
        return "loss_fraction needs the moment of the disaster; set disaster_s."
    if faults.disjoint_classes and faults.islands == 1:
        return "disjoint_classes is for islands; set islands=2 or more, or leave it out."
    if faults.day_s and faults.on_share == 1:
        return "with day_s a node is on for a share of each day; set on_share below 1."
    return None
