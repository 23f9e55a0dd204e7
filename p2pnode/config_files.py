"""Where settings come from: a TOML file, `P2PNODE_*` variables and flags, the later above the earlier.

Owns the names of file and variables, how text becomes a value, and the commented file that `p2pnode init` writes. Never guesses:
an unknown key is a `ConfigError` of one sentence that says where it stands.

Precedence as in flower and psyche (`peers.md` §5): defaults < file < environment < flags.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from p2pnode.config import Config, default_data_dir
from p2pnode.errors import ConfigError

ENV_PREFIX = "P2PNODE_"
# no keys: image data of the built-in tasks; which config file to read; tracebacks of the command line
ENV_OTHERS = frozenset({"P2PNODE_DATA", "P2PNODE_CONFIG", "P2PNODE_DEBUG"})
# Kubernetes sets these for a service that is called "p2pnode"; nobody typed them
_ENV_SERVICE_LINK = re.compile(r"P2PNODE_(SERVICE_(HOST|PORT)\w*|PORT(_\d+_(TCP|UDP)\w*)?)")
FILE_BYTES_MAX = 1 << 20  # a larger config file is a mistake
CONFIG_FILE = "config.toml"


def load(flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ, file: Path | None = None) -> Config:
    """The config from file, environment and flags (a flag that is None was not given).

    `file` (else `$P2PNODE_CONFIG`) must exist; without it `config.toml` of the data folder is read when it is there. Relative
    paths in a file are relative to the file. Raises ConfigError.
    """
    above: dict[str, Any] = {**_from_environ(environ), **{k: v for k, v in (flags or {}).items() if v is not None}}
    for key in above:
        _known(key, "flags")
    named = file or (Path(environ["P2PNODE_CONFIG"]) if environ.get("P2PNODE_CONFIG") else None)
    folder = Path(above.get("data_dir") or default_data_dir(environ)).expanduser()
    path = named or folder / CONFIG_FILE
    below = _from_file(path) if named or path.is_file() else {}
    if named is None and Path(below.get("data_dir", folder)).resolve() != folder.resolve():
        raise ConfigError(f"{path}: data_dir names another folder than the one the file is in; remove the key or use --config")
    below.setdefault("data_dir", folder)
    try:
        return Config(**{**below, **above})
    except ConfigError as error:
        source = f"{path}: " if any(str(error).startswith(key) and key not in above for key in below) else ""
        raise ConfigError(f"{source}{error}") from None


def _known(key: str, where: str) -> None:
    names = [f.name for f in fields(Config)]
    if key in names:
        return
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(names)}"
    raise ConfigError(f"{where}: unknown key '{key}'; {hint}")


def _from_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is larger than a config file can be; name another with --config")
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"config file {path} can't be read ({error.strerror}); name another with --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    for key in values:
        line = next((n for n, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[*\s*[\"']?{re.escape(key)}\b", row)), 0)
        _known(key, f"{path}, line {line}" if line else str(path))
    if isinstance(values.get("data_dir"), str) and values["data_dir"]:
        values["data_dir"] = path.parent / Path(values["data_dir"]).expanduser()
    if isinstance(values.get("task"), str) and ".py:" in values["task"]:
        values["task"] = str(path.parent / Path(values["task"]).expanduser())
    return values


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    hints = get_type_hints(Config)
    for variable, text in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHERS or _ENV_SERVICE_LINK.fullmatch(variable):
            continue
        key = variable.removeprefix(ENV_PREFIX).lower()
        _known(key, f"environment variable {variable}")
        try:
            values[key] = parse(hints[key], text)
        except ValueError as error:
            raise ConfigError(f"environment variable {variable} is '{text}', {error}") from None
    return values


def parse(kind: Any, text: str) -> Any:
    """A value of type `kind` from one line of text; lists are separated by commas. Raises ValueError with a hint."""
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("which is neither true nor false")
        return text.lower() in ("true", "1", "yes")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError("which is no whole number" if kind is int else "which is no number") from None
    if kind == tuple[str, ...]:
        return tuple(item.strip() for item in text.split(",") if item.strip())
    return text


# --- the file that `p2pnode init` writes --------------------------------------------------------------------------------


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False)  # for printable text JSON and TOML agree
        case _:
            return repr(value)


def commented_toml(config: Config | None = None) -> str:
    """A config file with every key and what it means; keys that have their default stay commented out."""
    config = config or Config()
    lines = ["# Configuration of a p2pnode daemon. P2PNODE_* variables and flags stand above what is set here.", ""]
    for f in fields(Config):
        if f.name == "data_dir":
            continue  # the file lives in it
        meta = f.metadata
        lines += [f"# {row}" for row in textwrap.wrap(meta["doc"], 118)]
        value = getattr(config, f.name)
        lines += [f"{'# ' if value == f.default else ''}{f.name} = {_toml(value)}", ""]
    return "\n".join(lines)
