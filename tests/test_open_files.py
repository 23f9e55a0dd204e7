"""The limit on open files, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from p2pnode.open_files import files_needed
from p2pnode.transport import TransportLimits

CODE = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from p2pnode.errors import ConfigError
from p2pnode.libp2p_transport import Libp2pTransport

async def main():
    transport = Libp2pTransport(bytes(32))
    try:
        await transport.start(lambda event: None)
    except ConfigError as error:
        print(error)
    else:
        print(*resource.getrlimit(resource.RLIMIT_NOFILE))
    await transport.stop()

asyncio.run(main())
"""
NEED = files_needed(TransportLimits())


@pytest.mark.parametrize(
    ("soft", "hard", "said"),
    [
        (64, 64, f"this process may open only 64 files, and 128 connections need {NEED}: raise the limit"),
        (64, 1000, "1000 1000"),
        (NEED, 1000, f"{NEED} 1000"),
    ],
)
def test_the_limit_is_raised_or_named(soft: int, hard: int, said: str) -> None:
    command = (sys.executable, "-c", CODE, str(soft), str(hard))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(said), done.stderr
