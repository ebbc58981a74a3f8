"""Data loading: its CPU utilisation, random draws that depend on the position only, and batches of any kind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import TensorDataset

from launcher.config.schema import LrConfig, RunConfig
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Position, Timeline
from launcher.system.processes import read_cpu_seconds
from launcher.train.build import build_model
from launcher.train.data import LoaderCpuUsage, MicroBatchLoader, to_device
from launcher.train.micro_batches import seed_generators


def test_loader_cpu_share_separates_computing_from_waiting() -> None:
    loading = LoaderCpuUsage()
    assert loading.measure_share() is None, "nothing was loaded"
    with loading:
        end_s = time.thread_time() + 0.05
        while time.thread_time() < end_s:
            pass
    computed = loading.measure_share()
    with loading:
        threading.Event().wait(0.1)
    waited = loading.measure_share()
    assert computed is not None
    assert waited is not None
    assert waited < computed / 3  # a ratio: on a busy machine both shares are small


def test_loader_cpu_share_of_processes() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    loading = LoaderCpuUsage([busy.pid])
    while (read_cpu_seconds(busy.pid) or 0.0) < 0.2:
        os.sched_yield()
    share = loading.measure_share()
    busy.kill()
    busy.wait()
    assert share is not None
    assert share > 0.1
    assert loading.measure_share() is None


# Random draws
def draw() -> torch.Tensor:
    """One number from each global generator."""
    return torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))], dtype=torch.float64)


@dataclass(frozen=True)
class DrawsInCollate:
    def collate(self, items: list[Any]) -> torch.Tensor:
        return draw()


class Drawing:
    """A data set whose items draw, as augmentation does."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        return draw()


CONFIG = RunConfig(optimizer={"_target_": "torch.optim.SGD"}, lr=LrConfig(base=0.1, base_batch=8))


def load_draws(items: Any, plan: BatchPlan, num_workers: int, rank: int = 0) -> list[list[float]]:
    config = replace(CONFIG, data=replace(CONFIG.data, num_workers=num_workers))
    timeline = Timeline(22, 44, ((0, plan),))
    loader = MicroBatchLoader.from_dataset(items, DrawsInCollate(), timeline, Position(), config, rank=rank, pin=False)
    updates = list(timeline.iter_updates())
    return [loader.next_batch().tolist() for update in updates for _ in update.micro_batches(rank)]


@pytest.mark.parametrize("items", [Drawing(), TensorDataset(torch.zeros(22))], ids=["drawing", "tensors"])
def test_collate_draws_depend_on_samples_only(items: Any) -> None:
    alone = BatchPlan(1, (8,), 4, 2)
    expected = load_draws(items, alone, 0)
    draw()  # the generators' state before does not matter
    assert load_draws(items, alone, 2) == load_draws(items, alone, 0) == expected
    assert len({value for row in expected for value in row}) == 3 * len(expected), "every micro-batch draws anew"
    both = BatchPlan(2, (4, 4), 4, 1)
    halves = [load_draws(items, both, 0, rank) for rank in (0, 1)]
    assert expected[:4] == [halves[0][0], halves[1][0], halves[0][1], halves[1][1]], "the same samples, another rank"


class DrawingSometimes(Drawing):
    """As an augmentation of one class: most samples draw nothing, and `[i]` of the others uses one generator."""

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = {3: random.random, 9: np.random.rand, 17: lambda: torch.rand(())}.get(index, float)()
        return torch.tensor([index, float(drawn)], dtype=torch.float64)


@dataclass(frozen=True)
class Stacks:
    def collate(self, items: list[Any]) -> torch.Tensor:
        return torch.stack(items)


def test_items_that_seldom_draw_are_the_same_in_any_process() -> None:
    """A run from its start, resumed, in loader processes that read every second batch, and on several ranks."""

    def load_rows(plan: BatchPlan, num_workers: int = 0, rank: int = 0, first: Position | None = None) -> list[Any]:
        first = first or Position()
        config = replace(CONFIG, data=replace(CONFIG.data, num_workers=num_workers))
        timeline = Timeline(22, 88, ((0, plan),))
        items = DrawingSometimes()
        loader = MicroBatchLoader.from_dataset(items, Stacks(), timeline, first, config, rank=rank, pin=False)
        counts = [len(update.micro_batches(rank)) for update in timeline.iter_updates(first)]
        return [row for count in counts for _ in range(count) for row in loader.next_batch().tolist()]

    alone = BatchPlan(1, (4,), 2, 2)
    expected = load_rows(alone)
    assert sum(drawn > 0 for _, drawn in expected) == 3 * 4, "three samples draw, in each of four epochs"
    assert load_rows(alone, num_workers=2) == expected
    assert load_rows(alone, first=Position(44, 12)) == expected[44:]
    halves = [load_rows(BatchPlan(2, (2, 2), 1, 2), rank=rank) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(expected)


def test_generators_of_a_forward_pass_are_seeded() -> None:
    drawn = []
    for _ in range(2):
        seed_generators(5, torch.device("cpu"))
        drawn.append(draw().tolist())
    assert drawn[0] == drawn[1]


@dataclass(frozen=True)
class DrawsParameters:
    def model(self) -> nn.Module:
        model = nn.Linear(1, 3)
        with torch.no_grad():
            model.bias.copy_(draw())
        return model


def test_initial_parameters_may_be_drawn_by_any_generator() -> None:
    assert torch.equal(build_model(DrawsParameters(), CONFIG).bias, build_model(DrawsParameters(), CONFIG).bias)


class Words(dict[str, Any]):
    """As a tokenizer's encoding: a mapping whose constructor takes more than a mapping."""

    def __init__(self, values: dict[str, Any], encoding: str) -> None:
        super().__init__(values)
        self.encoding = encoding


class Point(NamedTuple):
    x: Any
    y: Any


class Items(list[Any]):
    note = ""


@dataclass(frozen=True)
class Sample:
    x: Any
    name: str


class Graph:
    """As a graph library's batch: neither a container nor a dataclass, but with `to`."""

    def __init__(self, nodes: Any) -> None:
        self.nodes = nodes

    def to(self, device: torch.device) -> Graph:
        return Graph(self.nodes.to(device))


class InPlace(Graph):
    def to(self, device: torch.device) -> None:  # type: ignore[override]
        self.nodes = self.nodes.to(device)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("batch", "get"),
    [
        (defaultdict(list, x=[X]), lambda batch: batch["x"][0]),
        (OrderedDict(x=X), lambda batch: batch["x"]),
        (Words({"x": X}, "utf-8"), lambda batch: batch["x"]),
        (UserDict({"x": X}), lambda batch: batch["x"]),
        (MappingProxyType({"x": X}), lambda batch: batch["x"]),
        (Point(1, (X, None)), lambda batch: batch.y[0]),
        (Items([X]), lambda batch: batch[0]),
        (Sample(X, "a"), lambda batch: batch.x),
        (pack_sequence([X, X[:1]]), lambda batch: batch.data),
        ([{"x": (X,)}], lambda batch: batch[0]["x"][0]),
    ],
)
def test_batches_of_any_kind_move_and_keep_their_type(batch: Any, get: Any) -> None:
    moved = to_device(batch, torch.device("meta"), torch.float64)
    assert type(moved) is type(batch)
    assert get(moved).is_meta
    assert get(moved).dtype == torch.float64
    assert not get(batch).is_meta, "the loader's own batch is left alone"
    if isinstance(batch, defaultdict):
        assert moved["new"] == []
    if isinstance(batch, Words):
        assert moved.encoding == "utf-8"
    if isinstance(batch, PackedSequence):
        assert moved.batch_sizes.device.type == "cpu"


@pytest.mark.parametrize("kind", [Graph, InPlace])
def test_batch_that_moves_itself(kind: type[Graph]) -> None:
    assert to_device(kind(X), torch.device("meta"), torch.float32).nodes.is_meta
