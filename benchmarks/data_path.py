"""CPU time of the data path per batch, compared with a plain DataLoader over the same data set, in one process.

    python benchmarks/data_path.py [--rounds 15] [--batches 200] [--per-device 64]

Both read with data.num_workers=0 in a random order and move each batch to the CPU; the rounds alternate. The target is
a ratio of at most 1.05 for data sets that draw nothing. It also shows what seeding costs for one that draws.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from launcher.config.schema import LrConfig, RunConfig
from launcher.plan.batch import BatchPolicy, plan_batch
from launcher.plan.timeline import Position, Timeline
from launcher.train.data import MicroBatchLoader, to_device

SAMPLES = 50_000
CPU = torch.device("cpu")


class Rows(Dataset[Any]):
    """Rows of tensors, read one by one; it says nothing about what it draws."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class DeterministicRows(Rows):
    deterministic = True


class Batches(DeterministicRows):
    """Rows that are read as whole batches, as the data sets of the shipped recipes are."""

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self.x[list(indices)], self.y[list(indices)]


class NoisyRows(Rows):
    def __getitem__(self, index: int) -> Any:
        return self.x[index] + torch.rand(()), self.y[index]


class Plain:
    """A recipe without a `collate` of its own."""


def iter_plain(items: Any, batch: int) -> Iterator[Any]:
    collate = (lambda items: items) if hasattr(items, "__getitems__") else None
    while True:
        for x, y in DataLoader(items, batch, sampler=RandomSampler(items), collate_fn=collate, drop_last=True):
            yield x.to(CPU, non_blocking=True), y.to(CPU, non_blocking=True)


def iter_launcher(items: Any, batch: int) -> Iterator[Any]:
    timeline = Timeline(len(items), len(items) * 1000, ((0, plan_batch(BatchPolicy("scale", batch), 1)),))
    config = RunConfig(optimizer={"_target_": "torch.optim.SGD"}, lr=LrConfig(base=0.1, base_batch=batch))
    loader = MicroBatchLoader.from_dataset(items, Plain(), timeline, Position(), config, rank=0, pin=False)
    for update in timeline.iter_updates():
        for _ in update.micro_batches(0):
            yield to_device(loader.next_batch(), CPU, torch.float32)


def measure_batch_us(batches: Iterator[Any], count: int) -> float:
    begin = time.process_time()
    for _ in range(count):
        next(batches)
    return (time.process_time() - begin) / count * 1e6


def compare(items: Any, rounds: int, count: int, batch: int) -> tuple[float, float, float]:
    """Medians over rounds of the plain loader and of the launcher, in µs per batch, and of their ratio."""
    loaders: list[Callable[[Any, int], Iterator[Any]]] = [iter_plain, iter_launcher]
    iterators = [make(items, batch) for make in loaders]
    for iterator in iterators:
        measure_batch_us(iterator, 20)
    times = [[measure_batch_us(iterator, count) for iterator in iterators] for _ in range(rounds)]
    plain, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return plain, ours, statistics.median(launcher / bare for bare, launcher in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--per-device", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = torch.rand(SAMPLES, 1, 8, 8), torch.randint(10, (SAMPLES,))
    print(f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}\n")
    print("| data set | plain, µs per batch | launcher | ratio |\n| --- | --- | --- | --- |")
    for name, items in {
        "TensorDataset": TensorDataset(x, y),
        "map-style, `deterministic = True`": DeterministicRows(x, y),
        "map-style, undeclared": Rows(x, y),
        "map-style with `__getitems__`, `deterministic = True`": Batches(x, y),
        "map-style, draws from torch": NoisyRows(x, y),
    }.items():
        plain, ours, ratio = compare(items, options.rounds, options.batches, options.per_device)
        print(f"| {name} | {plain:.1f} | {ours:.1f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
