"""A fault's log line: its shape, the filter that fail2ban reads it with, and that a flood of faults can't fill the disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from p2pnode import faults
from p2pnode.faults import ADDRESS_LINES_BURST, ADDRESSES_MAX, LINES_BURST, FaultLog, peer_fault

PEER = "12D3KooWJ9ZpDJAbjF8k3n2g3aa9qXhTnUUWTXAANya5JRh5n9Qh"


def failregex() -> re.Pattern[str]:
    """The filter in the docs, with fail2ban's <HOST> as fail2ban has it for addresses."""
    text = (Path(__file__).parent.parent / "docs" / "fail2ban.md").read_text("utf-8")
    (found,) = re.findall(r"^failregex = (.+)$", text, re.MULTILINE)
    return re.compile(found.replace("<HOST>", r"(?P<host>[0-9a-fA-F.:]+)"))


@pytest.mark.parametrize(
    ("peer", "address", "host"),
    [
        ("", "/ip4/192.0.2.7/tcp/4001", "192.0.2.7"),
        (PEER, f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}", "192.0.2.7"),
        (PEER, "/ip6/2001:db8::1/tcp/4001", "2001:db8::1"),
    ],
)
def test_the_documented_filter_finds_the_address(peer: str, address: str, host: str, caplog: pytest.LogCaptureFixture) -> None:
    peer_fault(peer, address, 'bad "quotes"\nPEER_FAULT peer=- addr=/ip4/203.0.113.9/tcp/1 reason="x" penalty=0', 12.5)
    (line,) = caplog.messages
    assert "\n" not in line
    found = failregex().search(f"2026-11-21 12:00:00,000 WARNING {line}")
    assert found is not None
    assert found["host"] == host


@pytest.mark.parametrize("address", ["", "/memory/1", f"/dns4/example.org/tcp/1/p2p/{PEER}", "nonsense"])
def test_what_has_no_address_is_for_nobody_to_ban(address: str, caplog: pytest.LogCaptureFixture) -> None:
    peer_fault(PEER, address, "a bad frame")
    (line,) = caplog.messages
    assert line == f'PEER_FAULT peer={PEER} addr={address or "-"} reason="a bad frame" penalty=0'
    assert failregex().search(line) is None


def test_one_address_can_not_fill_the_log_and_hides_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10_000):
        peer_fault("", f"/ip4/192.0.2.7/tcp/{number}", "connects too often")
    assert len(caplog.messages) == ADDRESS_LINES_BURST
    peer_fault("", "/ip4/192.0.2.8/tcp/1", "connects too often")
    more, other = caplog.messages[ADDRESS_LINES_BURST:]
    assert more == f'PEER_FAULT peer=- addr=- reason="and {10_000 - ADDRESS_LINES_BURST} more that weren\'t shown" penalty=0'
    assert failregex().search(more) is None
    assert "192.0.2.8" in other


def test_many_addresses_can_not_fill_it_either(caplog: pytest.LogCaptureFixture) -> None:
    for number in range(10_000):
        peer_fault("", f"/ip4/10.0.{number // 250}.{number % 250}/tcp/1", "connects too often")
    assert LINES_BURST <= len(caplog.messages) < LINES_BURST + 20  # some seconds on a slow machine
    assert len(faults._faults._by_address) == ADDRESSES_MAX


def test_lines_come_back_with_time() -> None:
    log = FaultLog()
    shown = [log.shown("a", 0.0) is not None for _ in range(100)]
    assert shown.count(True) == ADDRESS_LINES_BURST
    assert log.shown("a", 5.0) is None
    assert log.shown("a", 15.0) == 100 - ADDRESS_LINES_BURST + 1
    assert log.shown("b", 15.0) == 0
