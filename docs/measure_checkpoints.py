"""What a checkpoint costs: bytes, seconds and memory, relative to the model. `python docs/measure_checkpoints.py [WIDTH]`.

Owns one process a line: a model of three linear layers of WIDTH (default 5,000: 200 MB), two steps, three checkpoints, and one
learner resumed. Memory is what the process took beyond what it had before, by the kernel's count of its own pages.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

OPTIMIZERS = {"SGD": {}, "SGD, momentum": {"momentum": 0.9}, "Adam": {}}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


def measure(name: str, width: int) -> str:
    """One row of the table."""
    import torch
    from torch import nn

    from p2pnode.learner import Learner
    from p2pnode.task import Shard, Task
    from p2pnode.trainer_results import TrainerSettings

    def task(shard: Shard) -> Task:
        model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2))
        data = (torch.randn(64, width), torch.arange(64) % 2)
        kind = getattr(torch.optim, name.partition(",")[0])
        return Task(model, data, data, nn.functional.cross_entropy, lambda p: kind(p, lr=1e-4, **OPTIMIZERS[name]), batch_size=8)

    with tempfile.TemporaryDirectory(prefix="p2pnode-measure-") as place:
        path, blobs = Path(place) / "c.safetensors", Path(place) / "blobs"
        blobs.mkdir()
        node = Learner(TrainerSettings(task, init_seed=1), blobs, None)  # type: ignore[arg-type]
        node.train(2)
        before, most, over = anonymous_bytes(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                most[0] = max(most[0], anonymous_bytes() - before)

        watching = threading.Thread(target=watch)
        watching.start()
        results = [node.checkpoint(path, {}) for _ in range(3)]
        over.set()
        watching.join()
        began = time.perf_counter()
        Learner(TrainerSettings(task, init_seed=1, resume=path), blobs, None)  # type: ignore[arg-type]
        resumed = time.perf_counter() - began
    size, seconds = results[0].size / node.schema.size, sorted(result.seconds for result in results)[1]
    return f"| {name} | {node.schema.size / 1e6:.1f} | {size:.3f} | {seconds:.2f} | {most[0] / 1e6:.0f} | {resumed:.2f} |"


def main() -> None:
    """The table, a process for each row."""
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    print("| optimizer | model, MB | file, models | seconds | more memory, MB | resumed in, s |\n|---|---|---|---|---|---|")
    for name in OPTIMIZERS:
        subprocess.run([sys.executable, __file__, str(width), name], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[2], int(sys.argv[1])), flush=True)
    else:
        main()
