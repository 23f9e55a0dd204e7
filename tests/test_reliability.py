"""RELIABILITY.md is what its script renders from the kept counts, and the script adds, bounds and keeps them rightly."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import tidy
from tests.tally import tally
from tests.tidy import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("reliability")


def entry(failed: int, of: int, **more: object) -> dict[str, Any]:
    about = {"command": "python -m x", "commit": "abc", "date": "2026-01-02", "machine": "2 cores", "seconds": 30}
    return {"failed": failed, "of": of, "figures": {}, **about, **more}


def test_the_page_is_what_the_script_makes_of_the_kept_counts(script: ModuleType) -> None:
    assert script.PAGE.read_text("utf-8") == script.render(script.read()), "run `python docs/reliability.py`, don't edit the page"
    places = {script.place(run, row.key) for run in script.RUNS for row in run.rows}
    assert set(script.read()) <= places, "a count is kept that the page has no row for"


def test_the_bound_is_the_exact_rule_of_three(script: ModuleType) -> None:
    bounds = [script.percent(script.upper_bound(tries)) for tries in (100, 1_000, 10_000, 100_000)]
    assert bounds == ["2.95 %", "0.30 %", "0.03 %", "0.003 %"]
    assert script.percent(script.upper_bound(5)) == "45 %"


def test_rows_say_what_was_counted_and_what_was_not(script: ModuleType) -> None:
    run = next(run for run in script.RUNS if run.name == "kills")
    states, numbers = (script.place(run, key) for key in ("sigkill states", "sequence numbers"))
    page = script.render({states: entry(0, 200, figures={"worst_s": [1.25], "span_s": [10, 300]}), numbers: entry(3, 5_000)})
    lines = {key: next(line for line in page.splitlines() if row.promise in line) for key, row in ((r.key, r) for r in run.rows)}
    assert "(worst_s 1.25, span_s 10 to 300) | **0 of 200** | 1.49 % | abc | 2026-01-02 |" in lines["sigkill states"]
    assert "**3 of 5,000** | see the run |" in lines["sequence numbers"]
    assert "| not run |" in lines["identities"]
    assert "1: 2 cores" in page


def test_a_run_replaces_its_own_rows_and_leaves_the_others(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; open(os.environ['P2PNODE_TALLY'], 'a').write(os.environ['LINES'])"
    lines = [
        {"key": "a", "failed": 1, "of": 2, "z": 1, "seeds": "0-1"},
        {"key": "a", "failed": 0, "of": 3},
        {"key": "b", "failed": 0, "of": 1},
    ]
    said = {"LINES": "".join(json.dumps(line) + "\n" for line in lines)}
    command = f"python -c {json.dumps(code)}"
    run = script.Run("one", command, (script.Row("a", "A"),), said, short="python -c 'raise SystemExit(3)'")
    monkeypatch.setattr(script, "RUNS", (run, script.Run("two", "python", (script.Row("a", "A"),))))
    monkeypatch.setattr(script, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    script.KEPT.write_text(json.dumps({"two: a": entry(0, 7)}), "utf-8")
    assert script.main(["one"]) == 1, "something failed"
    after = json.loads(script.KEPT.read_text("utf-8"))
    assert after["two: a"] == entry(0, 7)
    assert (after["one: a"]["failed"], after["one: a"]["of"], after["one: a"]["figures"]) == (1, 5, {"seeds": ["0-1"], "z": [1]})
    assert set(after) == {"one: a", "two: a"}
    assert re.fullmatch(r"\d+ cores, \d+ GiB, \S+ \S+, Python [\d.]+", after["one: a"]["machine"])
    assert script.main(["one", "--short"]) == 1, "a command that fails and counts nothing"
    assert json.loads(script.KEPT.read_text("utf-8")) == after
    assert script.PAGE.read_text("utf-8") == script.render(after)


def test_everything_that_is_counted_has_a_row(script: ModuleType) -> None:
    rows = {row.key for run in script.RUNS for row in run.rows}
    calls = (
        (source.path, node.args[0])
        for source in tidy.sources("tests")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == tally.__name__
    )
    mine = Path(__file__).name
    counted = {(path, key.value) for path, key in calls if isinstance(key, ast.Constant) and not path.endswith(mine)}
    assert not [(path, key) for path, key in sorted(counted) if key not in rows], "add a row to docs/reliability.py"


def test_a_tally_goes_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P2PNODE_TALLY", raising=False)
    tally("x", 0, 1)
    monkeypatch.setenv("P2PNODE_TALLY", str(tmp_path / "lines"))
    tally("x", 1, 4, seeds="0-3")
    tally("x", 0, 2)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text("utf-8").splitlines()]
    assert lines == [{"key": "x", "failed": 1, "of": 4, "seeds": "0-3"}, {"key": "x", "failed": 0, "of": 2}]
    with pytest.raises(AssertionError, match="3 of 2"):
        tally("x", 3, 2)
