"""Writes the golden frames, directions and state anew."""

from tests import golden
from tests.golden import directions

golden.write()
directions.write()
