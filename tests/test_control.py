"""The control socket: whole answers for whoever may ask, bounds for everybody else."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from p2pnode.control import CLIENTS_MAX, REQUEST_BYTES_MAX, SOCKET_FILE, ControlError, ControlServer, NotRunning, ask, ask_async
from p2pnode.errors import ConfigError


async def handler(request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "status":
            return {"name": "a", "rows": ["é"] * 10_000}
        case "wrong":
            raise ConfigError("give the whole path")
        case "bug":
            raise KeyError("x")
    return {"said": request["do"]}


@pytest.fixture
async def folder(tmp_path: Path) -> AsyncIterator[Path]:
    server = ControlServer(tmp_path, handler)
    await server.start()
    yield tmp_path
    await server.stop()
    assert not (tmp_path / SOCKET_FILE).exists()


async def raw(folder: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(folder / SOCKET_FILE))
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_a_request_is_answered_and_the_socket_is_ours_alone(folder: Path) -> None:
    assert stat.S_IMODE((folder / SOCKET_FILE).stat().st_mode) == 0o600
    assert (await ask_async(folder, {"do": "status"}))["rows"] == ["é"] * 10_000
    assert await asyncio.to_thread(ask, folder, {"do": "x"}) == {"said": "x"}


async def test_what_goes_wrong_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ControlError, match=r"^give the whole path$"):
        await ask_async(folder, {"do": "wrong"})
    with pytest.raises(ControlError, match="'bug' failed: KeyError"):
        await ask_async(folder, {"do": "bug"})
    assert (await ask_async(folder, {"do": "still here"}))["said"] == "still here"


@pytest.mark.parametrize(
    "junk",
    [b"\n", b"{}\n", b"[1]\n", b'{"do": 1}\n', b"\xff\xfe\n", b"[" * 10_000 + b"\n", b'{"do": "status"', b"GET / HTTP/1\n"],
)
async def test_junk_is_refused(folder: Path, junk: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(folder / SOCKET_FILE))
    writer.write(junk)
    writer.write_eof()
    assert b"a request is one line of JSON" in await reader.read()
    writer.close()


async def test_an_endless_line_is_cut_off(folder: Path) -> None:
    assert await raw(folder, b"x" * (REQUEST_BYTES_MAX + 1)) == b""


async def test_half_requests_take_no_more_than_their_places(folder: Path) -> None:
    half = [await asyncio.open_unix_connection(str(folder / SOCKET_FILE)) for _ in range(CLIENTS_MAX)]
    for _ in range(100):
        assert await raw(folder, b"") == b"", "closed at once"
    for _, writer in half:
        writer.close()
    async with asyncio.timeout(5):
        while True:
            try:
                assert (await ask_async(folder, {"do": "x"}))["said"] == "x"
                break
            except NotRunning:
                await asyncio.sleep(0)


async def test_nobody_there_is_not_running(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="start one with `p2pnode run`"):
        await ask_async(tmp_path, {"do": "status"})
    dead = ControlServer(tmp_path, handler)
    await dead.start()
    assert dead._server is not None
    dead._server.close()  # as a killed daemon leaves it
    assert (tmp_path / SOCKET_FILE).exists()
    with pytest.raises(NotRunning):
        await ask_async(tmp_path, {"do": "status"})
    again = ControlServer(tmp_path, handler)
    await again.start()
    assert await ask_async(tmp_path, {"do": "x"}) == {"said": "x"}
    await again.stop()


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    server = ControlServer(folder, handler)
    await server.start()
    assert await ask_async(folder, {"do": "x"}) == {"said": "x"}
    await server.stop()
