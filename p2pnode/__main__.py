"""`python -m p2pnode` is the same as the `p2pnode` command."""

from __future__ import annotations

import importlib

if __name__ == "__main__":
    importlib.import_module("cli.main").main()
