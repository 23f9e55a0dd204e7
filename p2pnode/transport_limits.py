"""How much a transport holds and how long it waits, in one place.

Owns the numbers of both transports, each with its unit in the name or beside it and its reason, and the check that they fit
together. Must never know what is done with them: the listener (`libp2p_listener.py`) counts connections, the corrected Yamux
(`libp2p_patches.py`) streams and bytes, links (`libp2p_link.py`) frames.

What a stranger can hold at most: `guests_max` connections for `handshake_s_max` + `open_s_max` seconds, and `guest_bytes_max` in
each. What a member can hold: `connection_bytes_max` unread bytes in one connection, and its two inboxes.

Idea: libp2p's DoS mitigation guide (limits per phase, per address, per subnet); Bitcoin Core's choice of whom to turn out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

YAMUX_WINDOW_BYTES = 256 * 1024  # what every stream is granted at first (Yamux specification)


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Sizes are bytes, times are seconds. Raises ValueError when two of them contradict each other."""

    # frames
    control_frame_bytes_max: int = 12 * 1024  # as `protocols.limits.Limits.frame_bytes_max`
    bulk_frame_bytes_max: int = 256 * 1024 + 4 * 1024  # a chunk of 256 KiB, its proof and its header
    control_queue_frames_max: int = 256  # per peer; beyond it the oldest is dropped: news beats history
    bulk_queue_bytes_max: int = 8 * 1024 * 1024  # per peer: two windows of 16 chunks
    inbox_bytes_max: int = 2 * 1024 * 1024  # per stream of a link: read, but not yet taken by the driver; then we stop reading it
    control_read_s_max: float = 30.0  # a control frame, once begun, is whole by then: 12 KiB at 3 kbit/s
    read_s_max: float = 60.0  # a bulk frame likewise, and so the gap between chunks: 260 KiB at 35 kbit/s
    write_s_max: float = 60.0  # a frame handed to the connection is gone by then; the same slow line
    hangup_s_max: float = 2.0  # what is queued may still leave for so long (DESIGN: a clean stop within 5 s)

    # dials
    dials_max: int = 32  # dials under way; the core allows itself fewer
    dial_addresses_max: int = 8  # addresses tried per dial; the rest is ignored
    dial_s_max: float = 10.0  # a whole dial, all addresses, until the link is up (go-libp2p: 15 s, 5 s of them local)
    dial_address_s_max: float = 4.0  # one address: a silent stale one leaves time for the next
    dial_stagger_s: float = 0.25  # between the addresses of one dial, which run side by side (RFC 8305 §8: 250 ms)
    address_rest_s: float = 5.0  # after a failed dial to an address until the next, whoever is said to live there
    address_ports_max: int = 8  # failed ports of one IP address that rest; beyond it all of that address rests

    # connections
    connections_max: int = 128  # authenticated or not; the core keeps 32 links at most
    guests_max: int = 64  # inbound ones without a link, handshakes in flight among them; a newcomer turns out the oldest
    guest_s_min: float = 1.0  # but no guest sooner, unless the newcomer's address had a link before: a handshake takes 0.3 s
    guest_bytes_max: int = 256 * 1024  # read from a guest; handshake, identify, pings and a hello need 5 KiB
    handshake_s_max: float = 10.0  # from a connection to Noise and Yamux (issue: a deadline for every phase)
    open_s_max: float = 10.0  # from there to a link; what has none by then is closed
    address_connections_max: int = 16  # inbound, from one IPv4 address or IPv6 /64: a household or lab behind one NAT
    subnet_connections_max: int = 32  # inbound, from one IPv4 /24 or IPv6 /48: half of what strangers may hold
    address_accepts_burst: int = 32  # connections from one address at once: a lab that starts again
    address_accepts_per_s: float = 2.0  # and then as many: redials of 16 peers whose links are gone
    addresses_remembered_max: int = 4096  # addresses whose accepts and links are remembered; 1 MB
    loopback_capped: bool = False  # whether the caps per address and subnet hold for this machine too: demos run 12 nodes on one
    silent_s_max: float = 60.0  # a connection whose other side's kernel says nothing for so long is broken (half open)
    accept_retry_s: float = 0.1  # when the process has no file left for a connection (trio.serve_listeners: the same)

    # streams
    connection_streams_max: int = 16  # open in one connection: we use two, identify and ping one each
    stream_opens_burst: int = 32  # streams that a peer opens at once in one connection, short-lived ones included
    stream_opens_per_s: float = 8.0  # and then as many: lookups, pings
    stream_window_bytes_max: int = 1024 * 1024  # unread bytes a peer may have in flight per stream: 20 MB/s at 50 ms
    connection_bytes_max: int = 8 * 1024 * 1024  # unread bytes of all streams of one connection
    negotiation_s_max: float = 10.0  # from a stream's opening to its protocol
    negotiation_line_bytes_max: int = 1024  # a protocol's name; the package would read any length

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), bool) and getattr(self, field.name) <= 0:
                raise ValueError(f"the limit {field.name} must be positive")
        for low, high in ORDER:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"the limit {low} ({getattr(self, low)}) is above {high} ({getattr(self, high)})")
        if self.stream_window_bytes_max < YAMUX_WINDOW_BYTES:
            raise ValueError(f"stream_window_bytes_max is below the {YAMUX_WINDOW_BYTES} bytes that every stream is granted")
        windows = 2 * self.stream_window_bytes_max + (self.connection_streams_max - 2) * YAMUX_WINDOW_BYTES
        if windows > self.connection_bytes_max:
            raise ValueError(f"connection_bytes_max is below the {windows} bytes that a connection's streams are granted")


ORDER = (  # limits that only make sense when the first is at most the second
    ("control_frame_bytes_max", "bulk_frame_bytes_max"),
    ("bulk_frame_bytes_max", "bulk_queue_bytes_max"),
    ("bulk_frame_bytes_max", "inbox_bytes_max"),
    ("control_read_s_max", "read_s_max"),
    ("dial_address_s_max", "dial_s_max"),
    ("dial_stagger_s", "dial_address_s_max"),
    ("guests_max", "connections_max"),
    ("address_connections_max", "subnet_connections_max"),
    ("guest_s_min", "handshake_s_max"),
)
