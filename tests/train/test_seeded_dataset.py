"""Batches that depend on the seed, the epoch and the samples only, whatever a process has read before."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset, default_collate

from launcher.errors import UsageError
from launcher.train import seeding
from launcher.train.seeded_dataset import EpochSamples, SeededDataset, collate_or_passthrough
from launcher.train.seeding import COLLATE_STREAM, GlobalGenerator, derive_seed, seed_host_generators

SIZE = 12


def draw_and_put_back() -> float:
    with torch.random.fork_rng(devices=[]):
        return float(torch.rand(()))


DRAWS: dict[str, Callable[[], Any]] = {
    "random": random.random,
    "numpy": lambda: float(np.random.rand()),
    "torch": lambda: float(torch.rand(())),
    "gauss": lambda: random.gauss(0, 1),
    "randn": lambda: float(np.random.randn()),
    "whole state": lambda: float(np.random.rand(312).sum()),  # as many words as the state has
    "own seed": lambda: random.seed(4) or random.random(),
    "put back": draw_and_put_back,
    "initial seed": lambda: torch.initial_seed() % 1000,
    "other initial seed": lambda: torch.random.initial_seed() % 1000,
    "state": lambda: hash(random.getstate()),
    "torch's state": lambda: int(torch.random.get_rng_state().sum()),
    "generator": lambda: float(torch.rand((), generator=torch.random.default_generator)),
}


class Drawing:
    """Items that draw in the ways of their sample."""

    def __init__(self, ways: dict[int, list[str]]) -> None:
        self.ways = ways
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> list[Any]:
        self.reads[index] += 1
        return [index, *(DRAWS[way]() for way in self.ways.get(index, ()))]


class DrawingTogether(Drawing):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def draw_all() -> list[Any]:
    return [random.random(), np.random.rand(), float(torch.rand(()))]


def collate_and_draw(items: list[Any]) -> Any:
    return items, draw_all()


def pass_items(items: list[Any]) -> Any:
    return items


def read_fully_seeded(items: Any, seed: int, collate: Callable[..., Any], parts: list[EpochSamples]) -> Any:
    """The definition: every generator is seeded for every sample and for the batch."""
    read = []
    for epoch, samples in parts:
        for sample in samples:
            seed_host_generators(derive_seed(seed, epoch, sample))
            read.append(items[sample])
    epoch, samples = parts[0]
    seed_host_generators(derive_seed(seed, COLLATE_STREAM, epoch, samples[0], sum(len(each) for _, each in parts)))
    return collate(read)


samples = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=3)
batches = st.lists(st.lists(st.tuples(st.integers(0, 3), samples), min_size=1, max_size=2), min_size=4, max_size=8)
ways = st.dictionaries(st.integers(0, SIZE - 1), st.lists(st.sampled_from(sorted(DRAWS)), max_size=2), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    ways,
    batches,
    st.sampled_from([Drawing, DrawingTogether]),
    st.sampled_from([collate_and_draw, pass_items]),
    st.data(),
)
def test_batches_are_those_of_full_seeding(
    ways: dict[int, list[str]], batches: Any, kind: type[Drawing], collate: Callable[..., Any], data: st.DataObject
) -> None:
    """Any samples draw in any ways; any process reads any of the batches, after any others and any other draws."""
    expected = [read_fully_seeded(Drawing(ways), 7, collate, parts) for parts in batches]
    processes = [SeededDataset(kind(ways), 7, collate) for _ in range(2)]
    for parts, batch in zip(batches, expected, strict=True):
        draw_all()
        assert processes[data.draw(st.integers(0, 1))].__getitems__(parts) == batch


@pytest.fixture
def seedings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each generator has been seeded by itself."""
    counts: Counter[str] = Counter()

    def count(generator: GlobalGenerator) -> GlobalGenerator:
        def seed(number: int) -> None:
            counts[generator.name] += 1
            generator.seed(number)

        return replace(generator, seed=seed)

    monkeypatch.setattr(seeding, "GLOBAL_GENERATORS", tuple(map(count, seeding.GLOBAL_GENERATORS)))
    return counts


def test_only_generators_that_samples_use_are_seeded_for_each(seedings: Counter[str]) -> None:
    items = Drawing({sample: ["torch"] for sample in range(SIZE)})
    batches = SeededDataset(items, 0, pass_items)
    for epoch in range(7):
        batches.__getitems__([(epoch, list(range(SIZE)))])
        if epoch == 1:  # the first batch finds them, the second learns what an unused generator draws
            seedings.clear()
    assert seedings == {"torch": 5 * SIZE, "random": 5, "numpy": 5}, "the others are watched once per batch"
    assert max(items.reads.values()) == 7, "nothing is read again"


def test_generators_that_no_item_uses_are_seeded_once_per_batch(seedings: Counter[str]) -> None:
    batches = SeededDataset(Drawing({}), 0, pass_items)
    for epoch in range(4):
        batches.__getitems__([(epoch, [3, 4]), (epoch + 1, [5])])
    seedings.clear()
    assert batches.__getitems__([(9, [1, 2])]) == [[1], [2]]
    assert seedings == {"random": 1, "numpy": 1, "torch": 1}


def test_declared_data_set_gets_a_list_of_its_own() -> None:
    """It may sort, cut or keep it: the sampler's lists stay as they are."""
    together: list[list[int]] = []
    items = DrawingTogether({})
    items.deterministic = True  # type: ignore[attr-defined]
    items.__getitems__ = lambda indices: together.append(indices) or [[indices.pop()] for _ in range(len(indices))]  # type: ignore[method-assign]
    batches, samples = SeededDataset(items, 0, pass_items), [3, 4]
    assert batches.__getitems__([(0, samples)]) == [[4], [3]]
    assert samples == [3, 4]
    assert batches.__getitems__([(0, samples), (1, [5])]) == [[5], [4], [3]]
    assert len(together) == 2


def test_declared_data_sets_are_neither_seeded_nor_watched(seedings: Counter[str]) -> None:
    class Declared(Drawing):
        deterministic = True

    state = random.getstate()
    for items in (Declared({}), TensorDataset(torch.zeros(SIZE))):
        batches = SeededDataset(items, 0, collate_or_passthrough)
        for _ in range(3):
            batches.__getitems__([(0, [1, 2])])
    assert not seedings
    assert random.getstate() == state


TENSORS = {
    "plain": (torch.rand(SIZE, 3, 2, 2), torch.arange(SIZE)),
    "channels last": (torch.rand(SIZE, 3, 2, 2).to(memory_format=torch.channels_last), torch.rand(SIZE, 2)),
    "bool": (torch.rand(SIZE) > 0.5,),
    "transposed": (torch.rand(2, SIZE).T,),
    "with gradients": (torch.rand(SIZE, 2, requires_grad=True), torch.arange(SIZE, dtype=torch.uint8)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_batch_of_a_tensor_dataset_is_what_collating_its_items_gives(name: str) -> None:
    items, rows = TensorDataset(*TENSORS[name]), [3, 0, 7]
    batch = SeededDataset(items, 0, collate_or_passthrough).__getitems__([(0, rows[:2]), (1, rows[2:])])
    expected = default_collate([items[row] for row in rows])
    assert type(batch) is type(expected)
    for own, stacked in zip(batch, expected, strict=True):
        assert torch.equal(own, stacked)
        assert (own.dtype, own.stride(), own.requires_grad) == (stacked.dtype, stacked.stride(), stacked.requires_grad)


def test_tensor_dataset_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda *_: pytest.fail("a sample is read by itself"))
    SeededDataset(TensorDataset(*TENSORS["plain"]), 0, collate_or_passthrough).__getitems__([(0, [1, 2])])


class Augmented(TensorDataset):
    """A TensorDataset that draws: being one says nothing about a subclass."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0] + torch.rand(())


def test_subclass_of_tensor_dataset_is_seeded() -> None:
    items = Augmented(torch.zeros(SIZE))
    draw_all()
    batch = SeededDataset(items, 5, pass_items).__getitems__([(2, [1, 3])])
    assert batch == read_fully_seeded(items, 5, pass_items, [(2, [1, 3])])


def test_first_use_after_the_first_batch_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    items = Drawing({3: ["numpy"], 5: ["numpy", "random"]})
    batches = SeededDataset(items, 0, pass_items)
    with caplog.at_level(logging.WARNING):
        for samples in ([1, 2], [2, 3], [3], [5, 6], [5]):
            batches.__getitems__([(0, samples)])
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "the global generator of numpy was used for the first time, by an item or by another thread of this process, "
        "while batch 2 of this process was read (samples 2 ... 3)",
        "the global generator of random was used for the first time, by an item or by another thread of this process, "
        "while batch 4 of this process was read (samples 5 ... 6)",
    ]
    assert items.reads == {1: 1, 2: 3, 3: 3, 5: 3, 6: 2}


def test_error_that_a_draw_without_a_seed_causes_is_not_reported() -> None:
    seed_host_generators(derive_seed(0, 0, 3))
    expected = random.random()

    class Picky(Drawing):
        def __getitem__(self, index: int) -> Any:
            if index == 3 and random.random() != expected:
                raise ValueError("the crop is outside the image")
            return index

    batches = SeededDataset(Picky({}), 0, pass_items)
    assert [batches.__getitems__([(0, samples)]) for samples in ([1], [2, 3])] == [[1], [2, 3]]


class Unreadable(DrawingTogether):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise OSError("torn")
        return super().__getitem__(index)


@pytest.mark.parametrize("deterministic", [True, False])
def test_unreadable_sample_is_named_also_if_samples_are_read_together(deterministic: bool) -> None:
    items = Unreadable({})
    items.deterministic = deterministic  # type: ignore[attr-defined]
    batches = SeededDataset(items, 0, pass_items)
    batches.__getitems__([(0, [1])])
    with pytest.raises(UsageError, match="sample 5 cannot be read: OSError: torn"):
        batches.__getitems__([(0, [1, 5, 2])])


class LazySample(dict[str, Any]):
    """A sample that is transformed when it is collated."""

    def __getitem__(self, name: str) -> Any:
        return torch.rand(())


def test_draws_while_torch_collates_are_seeded() -> None:
    class Lazy(Drawing):
        def __getitem__(self, index: int) -> Any:
            return LazySample(x=0) if index > 3 else {"x": torch.zeros(())}

    for parts in ([(0, [4, 5])], [(1, [6])], [(2, [7, 8])]):
        batches = SeededDataset(Lazy({}), 0, collate_or_passthrough)
        batches.__getitems__([(0, [1, 2])])
        draw_all()
        batch = batches.__getitems__(parts)
        assert torch.equal(batch["x"], read_fully_seeded(Lazy({}), 0, collate_or_passthrough, parts)["x"])


@pytest.mark.parametrize("kind", [list, tuple])
def test_undeclared_data_set_is_read_by_item_from_the_first_batch_on(kind: type) -> None:
    items = DrawingTogether({})
    items.__getitems__ = lambda indices: kind([index + 100] for index in indices)  # type: ignore[method-assign]
    batches = SeededDataset(items, 0, pass_items)
    assert [batches.__getitems__([(0, [1, 2])]) for _ in range(3)] == [[[1], [2]]] * 3


def test_module_that_is_first_imported_while_an_item_is_read_gets_torch_s_own_generator() -> None:
    imported: list[Any] = []

    class Importing(Drawing):
        def __getitem__(self, index: int) -> Any:
            from torch.random import default_generator

            imported.append(default_generator)
            return index

    batches = SeededDataset(Importing({}), 0, pass_items)
    for _ in range(2):
        batches.__getitems__([(0, [1])])
    assert all(generator is torch.default_generator for generator in imported)
    assert len(imported) == 2, "looking at it is no use of it"
