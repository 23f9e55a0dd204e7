"""The planted bugs can still be planted: each exact text is where it was, once, and the tests that should notice are there.

Whether they notice is what `python -m tests.planted` tries.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.planted.bugs import Bug, Misplanted, bugs
from tests.tidy import ROOT, tracked

BUGS = bugs()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_it_can_be_planted_and_somebody_should_notice(bug: Bug) -> None:
    ast.parse(bug.changed(ROOT / bug.file))
    assert bug.why
    assert bug.tests
    missing = [name for name in (*bug.tests, *bug.area) if not _exists(name)]
    assert not missing, f"name other tests in tests/planted/bugs.toml: {missing} aren't there any more"


def _exists(name: str) -> bool:
    file, _, function = name.partition("::")
    path = ROOT / file
    return path.is_file() and (not function or function.partition("[")[0] in _functions(path))


@cache
def _functions(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"^(?:async )?def (\w+)", path.read_text("utf-8"), re.MULTILINE))


def test_there_are_enough_and_each_has_its_name() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 14
    assert {bug.file for bug in BUGS} <= set(tracked()), "a bug is planted in a file that git keeps"


@pytest.mark.parametrize(("text", "sentence"), [("a", "2 times"), ("x", "0 times"), ("no file", "there is no")])
def test_a_bug_whose_place_is_gone_says_so(text: str, sentence: str, tmp_path: Path) -> None:
    bug = Bug("one", "some.py", "because", text, "c", ("tests/test_planted.py",))
    if text != "no file":
        (tmp_path / "some.py").write_text("a = 1\nb = a\n", "utf-8")
    with pytest.raises(Misplanted, match=sentence):
        bug.plant(tmp_path)


def test_planting_changes_one_place(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text("a = 1\nb = 2\n", "utf-8")
    Bug("one", "some.py", "because", "b = 2", "b = 3", ()).plant(tmp_path)
    assert (tmp_path / "some.py").read_text("utf-8") == "a = 1\nb = 3\n"
