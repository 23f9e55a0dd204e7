"""Writes the golden frames anew."""

from tests.golden import write

write()
