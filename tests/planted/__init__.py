"""Bugs planted on purpose, one at a time, to see whether the suite notices (test catalogue T4).

Owns the list (`bugs.toml`), how one is put into a copy of the tree (`bugs.py`) and the command (`python -m tests.planted`).
Must never touch the tree it runs from.
"""
