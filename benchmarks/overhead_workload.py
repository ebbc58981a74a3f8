"""What the programs that `overhead.py` compares train, and the ruler that measures all of them alike.

A recipe's `loss()` is called once for each micro-batch by every program. The ruler counts these calls, and at three of
them (after the first update, after warm-up, after the measured updates) notes the time and the CPU time.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["CLASSES_BY_NAME", "Items", "ItemsInBatches", "OtherProcesses", "Perceptron", "Ruler", "make_workload"]

#: The environment variables of the ruler: a folder, which is in the environment of all processes of the job and of no
#: other, and the calls of `loss()` at which it notes the times, as numbers separated by commas.
FOLDER_VARIABLE, MARKS_VARIABLE = "OVERHEAD_FOLDER", "OVERHEAD_MARKS"
INPUTS, CLASSES = 256, 10
SHIPPED = {"MeasuredGpt": ("gpt", "Gpt"), "MeasuredMlp": ("mlp", "Mlp"), "MeasuredResNet": ("resnet", "ResNet")}


class Ruler:
    """Notes the times at the marked calls, and writes them at the last one to `rank<rank>.json` in the folder."""

    def __init__(self) -> None:
        self._marks = [int(mark) for mark in os.environ.get(MARKS_VARIABLE, "").split(",") if mark]
        self._calls = 0
        self._notes: list[dict[str, float]] = []
        self._others: OtherProcesses | None = None

    def count_call(self) -> None:
        """Count a call of `loss()`, unless it is for a check or validation, which computes no gradient."""
        if not torch.is_grad_enabled():
            return
        self._calls += 1
        if self._calls in self._marks:
            self._note()

    def _note(self) -> None:
        last = self._calls == self._marks[-1]
        other_cpu_s = 0.0 if last else self._sum_other_cpu_s()
        note = {"time": time.time(), "wall_s": time.perf_counter(), "cpu_s": time.process_time()}
        self._notes.append(note | {"other_cpu_s": self._sum_other_cpu_s() if last else other_cpu_s})
        if last:
            report = {"notes": self._notes, "peak_rss_kb": read_peak_rss_kb()}
            path = Path(os.environ[FOLDER_VARIABLE], f"rank{os.environ['RANK']}.json")
            path.with_suffix(".part").write_text(json.dumps(report))
            path.with_suffix(".part").rename(path)

    def _sum_other_cpu_s(self) -> float:
        """On rank 0, the CPU seconds of all processes of the job that are not ranks, and of their children."""
        if os.environ["RANK"] != "0":
            return 0.0
        if self._others is None:
            self._others = OtherProcesses(os.environ[FOLDER_VARIABLE], os.getppid())
        return self._others.sum_cpu_s()


class OtherProcesses:
    """The processes with `folder` in their environment other than `agent`'s children, the ranks."""

    def __init__(self, folder: str, agent: int) -> None:
        self._folder = folder.encode()
        self._agent = agent
        self._found: dict[tuple[int, int], tuple[int, int]] = {}  # parent and CPU time, by pid and start time
        self._lost = 0

    def sum_cpu_s(self) -> float:
        """Their CPU seconds and those of their children, which never decrease from one call to the next.

        What a process has used is counted by the one that waits for it when it has ended. If that is none of the job's,
        what it had used by the last call still counts.
        """
        before, self._found = self._found, self._find()
        alive = {pid for pid, _ in self._found}
        ended = [before[process] for process in before.keys() - self._found.keys()]
        self._lost += sum(ticks for parent, ticks in ended if parent not in alive)
        return (self._lost + sum(ticks for _, ticks in self._found.values())) / os.sysconf("SC_CLK_TCK")

    def _find(self) -> dict[tuple[int, int], tuple[int, int]]:
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                stat = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
                process, parent = (int(pid), int(stat[19])), int(stat[1])
                # one that has ended and was not waited for has no environment
                if process not in self._found and self._folder not in Path("/proc", pid, "environ").read_bytes():
                    continue
            except OSError:  # it ended, or belongs to another user
                continue
            own = 0 if parent == self._agent else sum(map(int, stat[11:13]))
            waited_for = 0 if int(pid) == self._agent else sum(map(int, stat[13:15]))
            found[process] = parent, own + waited_for
        return found


def read_peak_rss_kb() -> int:
    """The peak of this program; `ru_maxrss` would include that of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


RULER = Ruler()


class Items:
    """Random vectors with random labels, read one by one: an ordinary data set, about which nothing is known."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(samples, INPUTS, generator=generator)
        self._labels = torch.randint(CLASSES, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._inputs[index], self._labels[index]


class ItemsInBatches(Items):
    """The same, read as whole batches and known to draw no random numbers."""

    deterministic = True

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._inputs[list(indices)], self._labels[list(indices)]


@dataclass(frozen=True)
class Perceptron:
    """Three hidden layers of `width` units."""

    width: int = 160
    samples: int = 16_384
    in_batches: bool = False

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        inputs = INPUTS
        for _ in range(3):
            layers += [nn.Linear(inputs, self.width), nn.ReLU()]
            inputs = self.width
        return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))

    def dataset(self, split: str) -> Items:
        samples = self.samples if split == "train" else 64
        return ItemsInBatches(samples) if self.in_batches else Items(samples)

    def size(self, split: str) -> int:
        return self.samples if split == "train" else 64

    def compute_sums(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        """The sum of the samples' losses, and their number. A script that uses this needs nothing of the launcher."""
        RULER.count_call()
        inputs, labels = batch
        return cross_entropy(model(inputs), labels, reduction="sum"), len(labels)

    def loss(self, model: Any, batch: Any) -> Any:
        from launcher.recipe import Loss

        return Loss(*self.compute_sums(model, batch))


def make_measured(kind: type) -> type:
    """A recipe of the launcher with the ruler."""

    def loss(self: Any, model: Any, batch: Any) -> Any:
        RULER.count_call()
        return kind.loss(self, model, batch)

    def compute_sums(self: Any, model: Any, batch: Any) -> tuple[Tensor, Any]:
        found = self.loss(model, batch)
        return found.total, found.count

    methods = {"loss": loss, "compute_sums": compute_sums, "__module__": __name__}
    return type(f"Measured{kind.__name__}", (kind,), methods)


def __getattr__(name: str) -> type:
    """`MeasuredGpt` and the like: the launcher's recipes, imported only where they are used."""
    if name not in SHIPPED:
        raise AttributeError(name)
    module, kind = SHIPPED[name]
    globals()[name] = make_measured(getattr(import_module(f"launcher.recipes.{module}"), kind))
    return globals()[name]


#: The recipe's class by the name of the option --recipe.
CLASSES_BY_NAME = {"perceptron": "Perceptron", "gpt": "MeasuredGpt", "mlp": "MeasuredMlp", "resnet": "MeasuredResNet"}


def make_workload(name: str, fields: Sequence[str]) -> Any:
    """The recipe `name` with fields such as `width=64`."""
    values = {key: json.loads(text) for key, _, text in (field.partition("=") for field in fields)}
    kind = Perceptron if name == "perceptron" else __getattr__(CLASSES_BY_NAME[name])
    return kind(**values)
