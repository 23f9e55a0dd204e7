"""What is trained: the user's function, the shard of data it is given, and the task it returns.

Owns the names by which a task is found (`digits`, `module:function`, `path.py:function`) and the checks of what a person
hands us. It must never run a training step and doesn't import torch before a task is made, so that a parent process which
only passes a task's name on stays light. The same functions serve the daemon's training process and the simulator.

Idea: WSGI and ASGI servers' `module:attribute` application paths; multiprocessing's rules for what a child can import.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from p2pnode.errors import ConfigError
from p2pnode.tasks.partition import Indices, partition
from protocols.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.data import Dataset

    Data = tuple[Tensor, Tensor] | Dataset[tuple[Any, Any]]

TaskFunction = Callable[["Shard"], "Task"]

BUILT_IN = {
    "digits": "p2pnode.tasks.digits:digits",
    "fashion-mnist": "p2pnode.tasks.images:fashion_mnist",
    "mnist": "p2pnode.tasks.images:mnist",
    "sentiment": "p2pnode.tasks.sentiment:sentiment",
}

_NOT_THE_USERS = (
    "<",
    str(Path(__file__).parent) + os.sep,
    *{sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib")},
)  # where an error's last line says little to the one whose code called it


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the data is mine: part `index` of `count`, from a `seed` that all nodes of the swarm share.

    `alpha`: Dirichlet concentration of label skew, None for IID parts. `rng` differs between nodes and is the same each time a
    shard is constructed. Raises ConfigError when the numbers don't fit together.
    """

    index: int = 0
    count: int = 1
    seed: int = 0
    alpha: float | None = None
    rng: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"shard {self.index} of {self.count} doesn't exist; count from 0 to {self.count - 1}.")
        if self.seed < 0:
            raise ConfigError(f"the data seed must be zero or more, not {self.seed}.")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"the Dirichlet alpha must be above zero, not {self.alpha}; leave it out for IID shards.")
        object.__setattr__(self, "rng", np.random.default_rng([self.seed, self.index, 1]))

    def split(self, labels: ArrayLike) -> Indices:
        """The indices of my samples, sorted, given the labels of all samples (one integer each).

        Every node computes the same partition, so shards are disjoint and complete. Raises ConfigError when there are fewer
        samples than shards.
        """
        return partition(labels, self.count, self.seed, self.alpha)[self.index]


@dataclass
class Task:
    """Everything a node needs to learn.

    `train_data` and `test_data`: a tuple (inputs, targets) of tensors whose first dimension counts samples, or a map-style
    Dataset of such pairs. `loss(outputs, targets)` is a mean over the batch. `optimizer(parameters)` makes an optimizer.
    `metric(outputs, targets)` is a number averaged over the test data; None means accuracy by argmax where targets are
    integers. `scalars`: how it learns in shared-seed mode; None: it can't, since no step sizes fit all tasks.
    """

    model: nn.Module
    train_data: Data
    test_data: Data
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batch_size: int = 32
    metric: Callable[[Tensor, Tensor], Tensor | float] | None = None
    scalars: Recipe | None = None


def load_task(spec: str | TaskFunction) -> TaskFunction:
    """The function that makes a task, from a built-in name, `module:function`, `path.py:function` or the function itself.

    Raises ConfigError, one sentence, when there is no such thing.
    """
    if not isinstance(spec, str):
        if not callable(spec):
            raise ConfigError(f"a task is a name or a function, not {type(spec).__name__}; give a function of one shard.")
        return spec
    place, colon, name = BUILT_IN.get(spec, spec).rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(_unknown(spec))
    found: Any = _load_file(spec, Path(place)) if place.endswith(".py") else _load_module(spec, place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"task '{spec}': {place} has no '{name}'{_nearest(name, vars(found))}; name a function in it.")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"task '{spec}': '{name}' is {_kind(found)}, not a function; name a function of one shard.")
    return found  # type: ignore[no-any-return]


def spec_of(task: str | TaskFunction) -> str:
    """Text by which another process on this machine finds `task` again with `load_task`.

    `module:qualname`, or `path.py:function` when the function stands in the program that was started. Raises ConfigError for
    a lambda, a function within a function, or one typed at a prompt.
    """
    if isinstance(task, str):
        place, colon, name = task.rpartition(":")
        return f"{Path(place).absolute()}:{name}" if colon and place.endswith(".py") else task
    module, name = getattr(task, "__module__", "") or "", getattr(task, "__qualname__", "")
    where = _module_address(module) if module and name else None
    if where is None or not _is_found(task, module, name):
        raise ConfigError(
            f"the training process can't find task {name or task!r} by name; move it to the top level of a module or file."
        )
    return f"{where}:{name}"


def make(spec: str | TaskFunction, shard: Shard, init_seed: int | None, first_order: bool = True) -> Task:
    """Call the task's function for `shard` and check what it returns; its optimizer only if `first_order`, as it takes seconds.

    Nodes that share `init_seed` start from the same parameters, if the function draws them from torch's generator as layers do;
    None gives each shard parameters of its own. torch's global generator is left as it was. Raises ConfigError, one sentence.
    """
    import torch

    from p2pnode.tasks.validation import validate

    function = load_task(spec)
    name = spec if isinstance(spec, str) else getattr(spec, "__qualname__", repr(spec))
    if init_seed is None:
        init_seed = int(np.random.default_rng([shard.seed, shard.index, 2]).integers(1 << 62))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed)
        try:
            task = function(shard)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"task '{name}' failed {place_of(error)}; correct it and start again.") from error
        return validate(name, task, first_order)


def place_of(error: BaseException) -> str:
    """Where and how the user's code failed: `in my_task.py, line 7: ZeroDivisionError: division by zero`."""
    if isinstance(error, SyntaxError):
        return f"in {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = list(traceback.extract_tb(error.__traceback__))
    users = [frame for frame in frames if not frame.filename.startswith(_NOT_THE_USERS)]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if not frames:
        return f"with {text}"
    last = (users or frames)[-1]
    return f"in {last.filename}, line {last.lineno}: {text}"


def _load_file(spec: str, path: Path) -> ModuleType:
    """Import a file by path, its folder importable as for a script. Never as `__main__`, whose guard stays shut."""
    if not path.is_file():
        raise ConfigError(f"task '{spec}': there is no file {path}; give the path of a Python file.")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"p2pnode_task_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path.absolute())
    assert found is not None, "a .py file always has a loader"
    assert found.loader is not None, "and a module spec made from one names it"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and typing look their module up here
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"task '{spec}' can't be imported: it failed {place_of(error)}; correct it.") from error
    return module


def _load_module(spec: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does; last, so that it shadows nothing
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"task '{spec}': there is no module {error.name}; install it, or give the path of a file as path.py:function."
            ) from None
        raise ConfigError(f"task '{spec}' can't be imported: it failed {place_of(error)}; correct it.") from error
    except Exception as error:
        raise ConfigError(f"task '{spec}' can't be imported: it failed {place_of(error)}; correct it.") from error


def _unknown(spec: str) -> str:
    if spec.endswith(".py"):
        return f"task '{spec}' names a file but no function; write {spec}:make_task."
    return (
        f"there is no built-in task '{spec}'{_nearest(spec, BUILT_IN)}; take one of {', '.join(BUILT_IN)}, "
        "or name your own as module:function or path.py:function."
    )


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _kind(thing: object) -> str:
    return f"a {type(thing).__name__}"


def _module_address(module: str) -> str | None:
    """The part of a task's text before the colon; None when another process can't import `module`."""
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    if main.__spec__ is not None:  # started with `python -m`
        return main.__spec__.name
    file = getattr(main, "__file__", None)
    return str(Path(file).absolute()) if file and file.endswith(".py") and Path(file).is_file() else None


def _is_found(task: object, module: str, name: str) -> bool:
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is task
