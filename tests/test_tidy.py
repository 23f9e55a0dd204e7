"""The house rules as a test: import directions, banned names, sizes, dead files, links, and the commands people paste.

Owns which rule is held where; the rules themselves are functions in `tidy.py`. Must never be loosened to let something
through: change the code, or change DESIGN on purpose and say why in ARCHITECTURE.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import tidy
from tests.tidy import ROOMS, ROOT, Source

SHIPPED = tidy.sources(*ROOMS)
ALL = tidy.sources(*ROOMS, "tests")


def nothing_in(complaints: Iterable[str]) -> None:
    """Fail with every complaint, one a line."""
    found = list(complaints)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("rule", [tidy.wrong_edges, tidy.impurities, tidy.code_from_data], ids=lambda rule: rule.__name__)
def test_shipped_code_keeps_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    nothing_in(chain.from_iterable(map(rule, SHIPPED)))


@pytest.mark.parametrize("rule", [tidy.oversize, tidy.undocumented], ids=lambda rule: rule.__name__)
def test_all_code_keeps_the_rule(rule: Callable[[Source], Iterator[str]]) -> None:
    nothing_in(chain.from_iterable(map(rule, ALL)))


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (tidy.wrong_edges, "protocols/a.py", "def f():\n    from p2pnode.config import Config"),
        (tidy.wrong_edges, "p2pnode/a.py", "import simulations.world"),
        (tidy.wrong_edges, "p2pnode/a.py", "from cli import main"),
        (tidy.wrong_edges, "simulations/a.py", "from p2pnode import Node"),
        (tidy.wrong_edges, "simulations/a.py", "from p2pnode.node import Node"),
        (tidy.wrong_edges, "cli/run.py", "from simulations import world"),
        (tidy.wrong_edges, "p2pnode/node.py", "import trio"),
        (tidy.wrong_edges, "protocols/core.py", "import torch"),
        (tidy.impurities, "protocols/a.py", "from time import monotonic"),
        (tidy.impurities, "protocols/a/b.py", "import os.path"),
        (tidy.impurities, "protocols/a.py", "open('x')"),
        (tidy.impurities, "protocols/a.py", "async def f(): ..."),
        (tidy.code_from_data, "p2pnode/a.py", "import pickle"),
        (tidy.code_from_data, "p2pnode/a.py", "import torch\ntorch.load('x')"),
        (tidy.code_from_data, "p2pnode/a.py", "eval('1')"),
        (tidy.code_from_data, "p2pnode/a.py", "np.load('x', allow_pickle=True)"),
        (tidy.oversize, "p2pnode/a.py", "def f():\n" + "    x = 1\n" * 70),
        (tidy.oversize, "p2pnode/a.py", "x = 1\n" * 401),
        (tidy.undocumented, "p2pnode/a.py", "x = 1"),
    ],
)
def test_each_rule_can_fail(rule: Callable[[Source], Iterator[str]], path: str, text: str) -> None:
    assert list(rule(Source(path, text)))


def test_the_rules_allow_what_design_allows() -> None:
    fine = [
        Source("simulations/a.py", "from p2pnode.task import Task\nfrom protocols.core import Core"),
        Source("cli/simulate.py", "from simulations import world"),
        Source("p2pnode/libp2p_bridge.py", "import trio\nfrom libp2p import new_host"),
        Source("protocols/merging/mean.py", "import torch\nfrom protocols.errors import RemoteError"),
        Source("p2pnode/a.py", "import time\nmodel.eval()\nre.compile('x')"),
    ]
    rules = (tidy.wrong_edges, tidy.impurities, tidy.code_from_data)
    nothing_in(complaint for source in fine for rule in rules for complaint in rule(source))


def test_no_dead_files() -> None:
    """Shipped code is used by shipped code (a test alone keeps nothing alive); helpers of the tests are used by tests."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        entry_points = {value.split(":")[0] for value in tomllib.load(file)["project"]["scripts"].values()}
    by_shipped = entry_points.union(*(_reached(source) - {source.module} for source in SHIPPED))
    by_tests = set().union(*(_reached(source) - {source.module} for source in tidy.sources("tests")))
    starts_itself = re.compile(r".*/(__init__|__main__|conftest)\.py|tests/(.*/)?test_\w+\.py")
    dead = [
        source.path
        for source in ALL
        if not starts_itself.fullmatch(source.path) and source.module not in (by_tests if source.room == "tests" else by_shipped)
    ]
    nothing_in(f"{path}: nothing imports it; wire it up or delete it" for path in dead)


def _reached(source: Source) -> set[str]:
    """Modules that `source` imports, whole or a name of, or writes down as text."""
    names = {name for _, name in tidy.imports(source)}
    return names | {name.rpartition(".")[0] for name in names} | set(tidy.mentions(source))


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for name in (name for name in tidy.tracked() if name.endswith(".md")):
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(<?([^)#\s>]+)", text):
            if not urlsplit(target).scheme and not (ROOT / name).parent.joinpath(target).exists():
                broken.append(f"{name}: link to {target}, which isn't there; mend the link or write the page")
    nothing_in(broken)


def _machine_words() -> dict[str, str]:
    """Texts that only this machine, or a package registry, would put into a file, and what to do about them."""
    words = {rf"(?<![\w./-]){re.escape(str(ROOT))}\b": "a path of this machine; write it relative to the repository"}
    home = str(Path.home())
    if home != "/":
        words[rf"(?<![\w./-]){re.escape(home)}/"] = "a home folder; write ~ or a relative path"
    if len(ROOT.parts) > 2 and ROOT.parts[1] not in {"home", "tmp", "opt", "srv", "usr", "var", "mnt"}:
        words[rf"(?<![\w.-])/{re.escape(ROOT.parts[1])}/"] = "a path of this machine; write it relative to the repository"
    hosts = {urlsplit(os.environ.get(name, "")).hostname for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL")}
    registries = [r"pypi[.]org", r"files[.]pythonhosted[.]org", r"download[.]pytorch[.]org", *(re.escape(h) for h in hosts if h)]
    words["|".join(registries)] = "a package registry's host; name the package, pip knows where it lives"
    words[r"--(extra-)?index[-]url|--find[-]links"] = "a package registry; leave the choice to the user's pip configuration"
    return words


def test_no_path_or_registry_of_this_machine() -> None:
    found = []
    for name in tidy.tracked():
        try:
            text = (ROOT / name).read_text("utf-8")
        except UnicodeDecodeError:
            continue
        for pattern, advice in _machine_words().items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name}:{line}: {match.group()!r} is {advice}")
    nothing_in(found)


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    assert len(commands) >= 2, "README.md opens with two fenced commands: try it, and test it"
    first, second = (command.strip() for command in commands[:2])
    assert "p2pnode demo" in first, f"README's first command is the main job, so it ends in `p2pnode demo`, not {first!r}"
    assert "pytest" in second, f"README's second command runs the tests, so it calls pytest; not {second!r}"
    planned = subprocess.run(["bash", ".ci/run", "--list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert second in planned, (
        f"`.ci/run --list` must contain README's second command verbatim:\n{second}\nbut it plans:\n{planned}"
    )
    assert "p2pnode demo" in planned, "`.ci/run` must run the main job, `p2pnode demo --json`"


@pytest.mark.parametrize("module", ["p2pnode", "p2pnode.config", "p2pnode.control", "p2pnode.node", "p2pnode.daemon", "cli.main"])
def test_starts_fast(module: str) -> None:
    """Neither the daemon nor `p2pnode status` may load torch; libp2p comes with the transport that is really used."""
    code = f"import sys, {module}; print([m for m in ('torch', 'libp2p', 'trio', 'sklearn') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == "[]", f"`import {module}` loads {loaded}; import it inside the function that needs it"
