"""Rules of the house as functions: a parsed file in, complaints out. `test_tidy.py` runs them over the tree.

Owns the reading of sources and each rule's sentence, which says what to do. Must never import what it judges: everything is
read from the syntax tree, so a broken module can still be named. The idea, style as a unit test, is TigerBeetle's `tidy.zig`.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("protocols", "p2pnode", "cli", "simulations")

FUNCTION_LINES_MAX = 70  # DESIGN §6.6
FILE_LINES_MAX = 400  # DESIGN §6.6

# Whatever would let a protocol wait, read a clock, a file, a socket or randomness that isn't its own (DESIGN §1).
IMPURE_MODULES = frozenset(
    {
        *("aiofiles", "anyio", "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "http", "io", "logging", "mmap", "os"),
        *("multiprocessing", "pathlib", "queue", "random", "secrets", "select", "selectors", "shutil", "signal", "socket"),
        *("sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid"),
    }
)
IMPURE_CALLS = frozenset({"open", "print", "input", "breakpoint", "hash"})  # hash(): differs with PYTHONHASHSEED
CODE_FROM_BYTES = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
CODE_FROM_TEXT = frozenset({"eval", "exec", "compile", "__import__"})
TENSOR_FILES = re.compile(r"protocols/((tensors|perturbation|sums|limbs|spsa)\.py|merging/.*|compression/.*)")
LIBP2P_FILES = re.compile(r"p2pnode/libp2p_\w+\.py")


@dataclass(frozen=True, slots=True)
class Source:
    """One Python file: its path relative to the repository and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def room(self) -> str:
        return self.path.split("/", 1)[0]

    @property
    def module(self) -> str:
        """The dotted name it is imported by: `p2pnode/tasks/__init__.py` is `p2pnode.tasks`."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def sources(*rooms: str) -> tuple[Source, ...]:
    """Every Python file of these folders, sorted by path."""
    files = sorted(path for room in rooms for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)
    return tuple(Source(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in files)


@cache
def tracked() -> tuple[str, ...]:
    """Paths git keeps, or, in an unpacked archive, every file that isn't made by a tool."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return tuple(sorted(path.as_posix() for path in found if not path.parts[0].startswith((".venv", ".git", "."))))
    return tuple(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def imports(source: Source, tree: ast.Module | None = None) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in the file; `from a import b` gives `a.b`."""
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in ast.walk(tree or source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def _within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _edge_allowed(source: Source, name: str) -> bool:
    match source.room:
        case "protocols":
            return _within(name, "protocols")
        case "p2pnode":
            return _within(name, "p2pnode", "protocols")
        case "simulations":
            return _within(name, "simulations", "protocols", "p2pnode.task", "p2pnode.tasks", "p2pnode.errors")
        case "cli" if source.path in ("cli/simulate.py", "cli/simulate_seeds.py"):
            return _within(name, "cli", "p2pnode", "protocols", "simulations")
        case "cli":
            return _within(name, "cli", "p2pnode")
    return True


def wrong_edges(source: Source) -> Iterator[str]:
    """Imports against DESIGN §1's picture."""
    for line, name in imports(source):
        if _within(name, *ROOMS, "tests") and not _edge_allowed(source, name):
            yield f"{source.path}:{line}: {source.room} must not import {name}; move what both need to the side both may import"
        if _within(name, "libp2p", "trio", "multiaddr") and not LIBP2P_FILES.fullmatch(source.path):
            yield f"{source.path}:{line}: {name} belongs into p2pnode/libp2p_*.py; go through p2pnode/transport.py"
        if source.room == "protocols" and _within(name, "torch") and not TENSOR_FILES.fullmatch(source.path):
            yield f"{source.path}:{line}: a core holds no tensor; torch belongs into protocols/tensors.py, merging/, compression/"


def impurities(source: Source) -> Iterator[str]:
    """What a sans-IO protocol must not touch. Only `protocols/` is judged."""
    if source.room != "protocols":
        return
    tree = source.tree
    for line, name in imports(source, tree):
        if name.split(".")[0] in IMPURE_MODULES:
            yield f"{source.path}:{line}: {name} is I/O, a clock or global state; take it as an argument (now, rng, bytes)"
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            yield f"{source.path}:{node.lineno}: a protocol never waits; return an effect and handle the event that answers it"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            yield f"{source.path}:{node.lineno}: {node.func.id}() in a protocol; return an effect or a Report instead"


def code_from_data(source: Source) -> Iterator[str]:
    """Whatever turns bytes from outside into running code."""
    tree = source.tree
    for line, name in imports(source, tree):
        if name.split(".")[0] in CODE_FROM_BYTES or name == "torch.load":
            yield f"{source.path}:{line}: {name} runs code from data; use safetensors or capped msgpack"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and f"{node.value.id}.{node.attr}" == "torch.load"
        ):
            yield f"{source.path}:{node.lineno}: torch.load can run code from a file; use safetensors"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODE_FROM_TEXT:
            yield f"{source.path}:{node.lineno}: {node.func.id}() runs code from text; parse the text instead"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is_false(node.value):
            yield f"{source.path}:{node.value.lineno}: allow_pickle runs code from a file; leave it False"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def oversize(source: Source) -> Iterator[str]:
    """Functions and files too long to be held in one head."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"{source.path}: {lines} lines, at most {FILE_LINES_MAX}; split it by what its parts own"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                where = f"{source.path}:{node.lineno}: {node.name}"
                yield f"{where} has {length} lines, at most {FUNCTION_LINES_MAX}; take a step out of it"


def undocumented(source: Source) -> Iterator[str]:
    """Modules that don't say what they own."""
    if not ast.get_docstring(source.tree) and (source.text.strip() or source.room != "tests"):
        yield f"{source.path}: no module docstring; open with what it owns, what it must never do, where the idea is from"


def mentions(source: Source) -> Iterator[str]:
    """Dotted module names written as text: `-m` arguments, `module:function` of built-in tasks, lazy name tables."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+(:\w+)?", node.value):
            yield node.value.split(":")[0]
