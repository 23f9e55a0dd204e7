"""The config: precedence, one-sentence errors, and a generated file that can't go stale."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.config import Config, default_data_dir
from p2pnode.config_files import CONFIG_FILE, commented_toml, load
from p2pnode.errors import ConfigError

PEER = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
ADDRESS = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"
TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "swarm": TEXTS,
    "name": TEXTS,
    "listen": st.lists(st.sampled_from(["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/4001"]), min_size=1, max_size=3).map(tuple),
    "join": st.lists(st.just(ADDRESS), max_size=3).map(tuple),
    "local_steps": st.integers(1, 1_000_000),
    "cycle_s": st.floats(0, 86_400),
    "alpha": st.floats(0, 1e6),
    "measure_alone": st.booleans(),
    "limits": st.sampled_from(["laptop", "edge"]),
    "protocol": st.sampled_from(["models", "scalars", "both"]),
    "run_entries": st.integers(1, 1024),
    "models_every_s": st.floats(0, 86_400),
}


def text_of(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"XDG_DATA_HOME": str(tmp_path)}


@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_the_written_file_says_the_same(values: dict[str, Any]) -> None:
    config = Config(**values)
    assert replace(Config(**tomllib.loads(commented_toml(config))), data_dir=config.data_dir) == config


@given(st.fixed_dictionaries({}, optional={k: v for k, v in SETTINGS.items() if k not in ("swarm", "name")}))
def test_the_environment_says_the_same(values: dict[str, Any]) -> None:
    environ = {f"P2PNODE_{key.upper()}": text_of(value) for key, value in values.items()}
    config = load(environ={**environ, "XDG_DATA_HOME": "/nonexistent"})
    assert config == Config(**values, data_dir=Path("/nonexistent/p2pnode"))


def test_every_key_is_in_the_written_file_with_its_meaning() -> None:
    text = commented_toml()
    assert tomllib.loads(text) == {}, "what has its default stays commented out"
    for f in fields(Config):
        if f.name != "data_dir":
            assert f"# {f.name} = " in text
            assert f.metadata["doc"].split()[0] in text
    assert tomllib.loads(text.replace("# swarm =", "swarm =")) == {"swarm": "default"}


def test_flags_stand_above_the_environment_above_the_file(tmp_path: Path, home: dict[str, str]) -> None:
    folder = tmp_path / "p2pnode"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text('swarm = "file"\nfan_out = 3\nlocal_steps = 7\ntask = "mine.py:make"\n')
    config = load({"swarm": "flag", "name": None}, {**home, "P2PNODE_SWARM": "environment", "P2PNODE_FAN_OUT": "5"})
    assert (config.swarm, config.fan_out, config.local_steps) == ("flag", 5, 7)
    assert config.task == str(folder / "mine.py:make"), "a path in a file is relative to the file"
    assert config.data_dir == folder


def test_the_data_folder_is_found(tmp_path: Path) -> None:
    assert default_data_dir({"HOME": "/home/a"}) == Path("/home/a/.local/share/p2pnode")
    assert default_data_dir({"HOME": "/home/a", "XDG_DATA_HOME": "/x"}) == Path("/x/p2pnode")
    assert default_data_dir({"HOME": "/home/a", "XDG_DATA_HOME": "not/absolute"}) == Path("/home/a/.local/share/p2pnode")
    assert load(environ={"P2PNODE_DATA_DIR": str(tmp_path), "P2PNODE_DATA": "/images"}).data_dir == tmp_path
    assert load({"data_dir": tmp_path / "flag"}, {"P2PNODE_DATA_DIR": str(tmp_path)}).data_dir == tmp_path / "flag"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('\nswam = "x"', "line 2: unknown key 'swam'; did you mean 'swarm'?"),
        ('[gossip]\nfan_out = 2', "line 1: unknown key 'gossip'; the keys are swarm, name, "),
        ('fan-out = 2', "did you mean 'fan_out'?"),
        ("fan_out = 0", "fan_out is 0; it must be from 1 to 32"),
        ("fan_out = true", "fan_out must be a whole number, not True"),
        ("fan_out = 2.0", "fan_out must be a whole number, not 2.0"),
        ('fan_out = "2"', "fan_out must be a whole number, not '2'"),
        ("cycle_s = nan", "cycle_s is nan; it must be from 0 to 86,400"),
        ("swarm = 5", "swarm must be a text, not 5"),
        ('swarm = ""', "swarm is empty"),
        ('swarm = "a\\nb"', "swarm must be printable"),
        ('join = "one"', "join must be a list of texts, not 'one'"),
        ('join = ["/ip4/192.0.2.7/tcp/4001"]', "names no peer; paste the whole line"),
        (f'join = ["{ADDRESS[:-1]}"]', "is damaged"),
        ('listen = ["localhost:80"]', "which is no multiaddr; one looks like /ip4/192.0.2.7/tcp/4001"),
        ('listen = []', "listen is empty"),
        ('protocol = "bytes"', "protocol is 'bytes'; choose from models, scalars, both"),
        ('run_entries = 0', "run_entries is 0; it must be from 1 to 1,024"),
        ('run_s = -1.0', "run_s is -1.0; it must be from 0 to 3,600"),
        ('limits = "huge"', "limits is 'huge'; choose from laptop, edge"),
        ("shard_index = 4\nshard_count = 4", "the last part is 3; count parts from 0"),
        ("swarm = ", "is no TOML"),
        ('data_dir = "/elsewhere"', "data_dir names another folder"),
    ],
)  # fmt: skip
def test_a_wrong_file_gives_one_sentence(tmp_path: Path, home: dict[str, str], text: str, sentence: str) -> None:
    folder = tmp_path / "p2pnode"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(environ=home)
    assert sentence in str(caught.value)
    assert str(folder / CONFIG_FILE) in str(caught.value), "it says where"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"P2PNODE_SWRM": "x"}, "environment variable P2PNODE_SWRM: unknown key 'swrm'; did you mean 'swarm'?"),
        ({"P2PNODE_FAN_OUT": "two"}, "environment variable P2PNODE_FAN_OUT is 'two', which is no whole number"),
        ({"P2PNODE_MEASURE_ALONE": "maybe"}, "P2PNODE_MEASURE_ALONE is 'maybe', which is neither true nor false"),
        ({"P2PNODE_CYCLE_S": "inf"}, "cycle_s is inf; it must be from 0 to 86,400"),
        ({"P2PNODE_CONFIG": "/nonexistent/c.toml"}, "config file /nonexistent/c.toml can't be read (No such file or directory)"),
    ],
)
def test_a_wrong_environment_gives_one_sentence(home: dict[str, str], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={**home, **environ})
    assert sentence in str(caught.value)


def test_variables_that_kubernetes_sets_are_nobodys_typing_error(home: dict[str, str]) -> None:
    service = {"P2PNODE_PORT": "tcp://10.0.0.1:80", "P2PNODE_PORT_80_TCP_ADDR": "10.0.0.1", "P2PNODE_SERVICE_HOST": "10.0.0.1"}
    assert load(environ={**home, **service}) == load(environ=home)


@given(st.binary(max_size=200))
def test_whatever_the_file_holds_only_a_config_error_comes_out(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("c") / "any.toml"
    path.write_bytes(data)
    said = ""
    try:
        load(environ={"XDG_DATA_HOME": "/nonexistent"}, file=path)
    except ConfigError as error:
        said = str(error)
    assert not said or str(path) in said


def test_importing_the_package_loads_neither_torch_nor_libp2p() -> None:
    code = (
        "import sys, p2pnode, p2pnode.config; from p2pnode import Config; Config();"
        "heavy = {'torch', 'libp2p', 'trio', 'numpy', 'asyncio'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
