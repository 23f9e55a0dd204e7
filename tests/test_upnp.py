"""The port at the router: mapped, renewed and given back; against a fake router on loopback, for there is no other here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from p2pnode import libp2p_transport, upnp
from p2pnode.libp2p_transport import Libp2pTransport
from p2pnode.upnp import PortMapping
from tests.fake_router import FakeRouter
from tests.transports import seed


@pytest.fixture
def routers() -> Iterator[Callable[..., FakeRouter]]:
    made: list[FakeRouter] = []

    def make(*, search: bool = False, **kind: Any) -> FakeRouter:
        router = FakeRouter(**kind)
        made.append(router)
        router.start(search=search)
        return router

    yield make
    for router in made:
        router.stop()


def wait(true: Callable[[], bool], what: str, seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} has not come true"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("kind", "address", "lease"),
    [
        ({}, "/ip4/45.0.1.1/tcp/4001", 3600),
        ({"permanent_only": True}, "/ip4/45.0.1.1/tcp/4001", 0),
        ({"taken": (4001, 4002)}, "/ip4/45.0.1.1/tcp/4003", 3600),
    ],
    ids=["plain", "permanent only", "taken"],
)
def test_a_port_is_mapped_and_given_back(
    routers: Callable[..., FakeRouter], kind: dict[str, Any], address: str, lease: int
) -> None:
    router, told = routers(**kind), list[str]()
    mapping = PortMapping(4001, told.append, url=router.url)
    mapping.start()
    wait(lambda: bool(told), "a mapping")
    assert told == [address]
    assert router.mappings == {int(address.rpartition("/")[2]): ("127.0.0.1", 4001, lease)}
    assert mapping.status() == {"address": address, "state": "mapped"}
    mapping.stop()
    assert router.mappings == {}


def test_a_router_is_found_by_search(routers: Callable[..., FakeRouter]) -> None:
    try:
        router = routers(search=True)
    except OSError as error:
        pytest.skip(f"no multicast on loopback: {error}")
    told = list[str]()
    mapping = PortMapping(4001, told.append, interface="127.0.0.1")
    mapping.start()
    wait(lambda: bool(told), "a mapping")
    mapping.stop()
    assert router.added == 1


def test_a_mapping_is_renewed_and_one_that_is_lost_is_told(
    routers: Callable[..., FakeRouter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upnp, "RENEW_S", 0.05)
    monkeypatch.setattr(upnp, "AGAIN_S", 0.05)
    router, told = routers(), list[str]()
    mapping = PortMapping(4001, told.append, url=router.url)
    mapping.start()
    wait(lambda: router.added >= 3, "a renewal")
    assert told == ["/ip4/45.0.1.1/tcp/4001"]
    router.outer = "10.0.0.1"
    wait(lambda: told[-1] == "", "the loss")
    assert "isn't public" in mapping.state
    router.outer = "45.0.2.1"
    wait(lambda: told[-1] == "/ip4/45.0.2.1/tcp/4001", "the new address")
    mapping.stop()


@pytest.mark.parametrize("kind", [{"taken": tuple(range(4001, 4020))}, {"outer": ""}, {"outer": "nonsense"}])
def test_a_router_that_refuses_is_a_state(routers: Callable[..., FakeRouter], kind: dict[str, Any]) -> None:
    told = list[str]()
    mapping = PortMapping(4001, told.append, url=routers(**kind).url)
    mapping.start()
    wait(lambda: mapping.state != "asking", "an answer")
    assert (mapping.address, told) == ("", [])
    mapping.stop()


async def test_a_node_announces_what_its_router_maps_and_takes_it_back(
    routers: Callable[..., FakeRouter], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = routers()
    monkeypatch.setattr(libp2p_transport, "PortMapping", partial(PortMapping, url=router.url))
    loopback = Libp2pTransport(seed(1), upnp=True)
    await loopback.start(lambda event: None)
    assert loopback.nat_status()["upnp"] is None, "for this machine only"
    await loopback.stop()
    node = Libp2pTransport(seed(1), ("/ip4/0.0.0.0/tcp/0",), upnp=True)
    await node.start(lambda event: None)
    await asyncio.to_thread(wait, lambda: node.addresses[0].startswith("/ip4/45.0.1.1/tcp/"), "the announcement")
    assert len(router.mappings) == 1
    await node.stop()
    assert router.mappings == {}
