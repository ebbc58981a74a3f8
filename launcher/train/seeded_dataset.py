"""Batches that depend on the seed, the epoch and the samples only, at the price of the draws that are made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data.dataloader import default_collate

from launcher.errors import UsageError
from launcher.run_dir.failures import describe_error
from launcher.train.seeding import COLLATE_STREAM, UsedGenerators, derive_seed, seed_host_generators

__all__ = ["EpochSamples", "SeededDataset", "collate_or_passthrough", "get_collate_fn"]

PLAIN_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
EpochSamples = tuple[int, list[int]]  # (epoch, samples): a batch, or the part of it that is in the epoch


def get_collate_fn(recipe: Any) -> Callable[..., Any]:
    return getattr(recipe, "collate", None) or collate_or_passthrough


def collate_or_passthrough(items: Any) -> Any:
    """Apply torch's default_collate to a list of items; pass a batch that the dataset already collated through."""
    return default_collate(items) if isinstance(items, list) else items


def can_stack_rows(tensor: torch.Tensor) -> bool:
    """Whether selected rows of a tensor are what `torch.stack` makes of them: the same values, strides and type."""
    simple = type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.requires_grad
    return simple and tensor.is_contiguous() and tensor.dtype in PLAIN_DTYPES


def stack_rows(tensors: Sequence[torch.Tensor], rows: list[int]) -> list[torch.Tensor]:
    """The collated batch of a TensorDataset, without reading and stacking its samples one by one."""
    index = torch.tensor(rows)
    return [tensor.index_select(0, index.to(tensor.device)) for tensor in tensors]


class SeededDataset(Dataset[Any]):
    """The collated batches of a data set: the same in any process, at any time, whatever was read before.

    Each item is as if the global generators of random, numpy and torch had been seeded from (seed, epoch, sample) just
    before it was read, and each batch as if they had been seeded from its first sample before it was collated.

    Seeding costs more than reading many an item, so a generator is seeded for each sample only once a sample has used
    it. The others are watched while a batch is read. If one of them is used for the first time, that batch is read
    again with all of them seeded: reading an item twice must give the same item. Used means drawn from, seeded, or
    its state or seed read through the functions of `random`, `numpy.random` and `torch`. Not noticed is an item that
    reads the state and puts it back through names of these functions that were imported before (`from random import
    getstate`), or through the methods of `torch.default_generator`: it should draw from a generator of its own.

    A TensorDataset, and a data set that says `deterministic = True`, are neither seeded nor watched. If the latter has
    `__getitems__`, that reads the whole batch, and may return it collated already. Any other data set is read item by
    item, since its `__getitems__` need not give what its `__getitem__` gives.
    """

    def __init__(self, items: Any, seed: int, collate: Callable[..., Any]) -> None:
        self._items = items
        self._seed = seed
        self._collate = collate
        self._collate_draws = collate not in (collate_or_passthrough, default_collate)
        self._deterministic = type(items) is TensorDataset or bool(getattr(items, "deterministic", False))
        self._get_items: Callable[[list[int]], Any] | None = (
            getattr(items, "__getitems__", None) if self._deterministic else None
        )
        if type(items) is TensorDataset and not self._collate_draws and all(map(can_stack_rows, items.tensors)):
            self._get_items, self._collate = partial(stack_rows, items.tensors), list  # collated already
        self._generators = UsedGenerators()
        self._batches_read = 0

    def __getitems__(self, parts: Sequence[EpochSamples]) -> Any:
        """The collated batch of the samples.

        Raises:
            UsageError: a sample cannot be read; the message names it.
        """
        self._batches_read += 1
        if self._deterministic:
            return self._collate_items(parts, self._read_items(parts))
        if self._batches_read == 1:
            return self._read_seeded(parts)
        problem: BaseException | None = None
        with self._generators.watch() as found:
            try:
                batch = self._read_items(parts)
                if not self._collate_draws:
                    batch = self._collate_items(parts, batch)
            except (Exception, SystemExit) as error:  # it may be due to a draw from a generator that was not seeded
                problem = error
        if found:
            self._report_use([generator.name for generator in found], parts)
            return self._read_seeded(parts)
        if problem is not None:
            raise problem
        return self._collate_items(parts, batch) if self._collate_draws else batch

    def _read_seeded(self, parts: Sequence[EpochSamples]) -> Any:
        """The batch, with all generators seeded for each sample and for `collate`; notes which ones samples use."""
        items: list[Any] = []
        for epoch, samples in parts:
            for sample in samples:
                with self._generators.watch(derive_seed(self._seed, epoch, sample)):
                    items += self._read_singly([(epoch, [sample])])
        seed_host_generators(self._derive_collate_seed(parts))
        return self._collate(items)

    def _read_items(self, parts: Sequence[EpochSamples]) -> Any:
        """The items with the used generators seeded, or what the `__getitems__` of a declared data set returns."""
        if self._get_items is None:
            return self._read_singly(parts)
        try:
            return self._get_items([sample for _, samples in parts for sample in samples])
        except (Exception, SystemExit):
            self._read_singly(parts)  # its error names the sample
            raise

    def _read_singly(self, parts: Sequence[EpochSamples]) -> list[Any]:
        items: list[Any] = []
        source, generators = self._items, self._generators.used
        sample = -1
        try:
            for epoch, samples in parts:
                if not generators:
                    items += [source[sample := each] for each in samples]
                    continue
                for sample in samples:
                    seed = derive_seed(self._seed, epoch, sample)
                    for generator in generators:
                        generator.seed(seed)
                    items.append(source[sample])
        except UsageError:
            raise
        except (Exception, SystemExit) as problem:
            kind, why = type(problem).__name__, describe_error(problem)
            raise UsageError(f"sample {sample} cannot be read: {kind}: {why}; fix or remove it") from problem
        return items

    def _collate_items(self, parts: Sequence[EpochSamples], items: Any) -> Any:
        """Collate with all generators seeded; for torch's own collate, which draws nothing, those that samples use.

        A declared data set uses none, so torch's own collate of its items seeds nothing.
        """
        if self._collate_draws:
            seed_host_generators(self._derive_collate_seed(parts))
        elif self._generators.used:
            self._generators.seed(self._derive_collate_seed(parts))
        return self._collate(items)

    def _derive_collate_seed(self, parts: Sequence[EpochSamples]) -> int:
        epoch, samples = parts[0]
        return derive_seed(self._seed, COLLATE_STREAM, epoch, samples[0], sum(len(samples) for _, samples in parts))

    def _report_use(self, names: list[str], parts: Sequence[EpochSamples]) -> None:
        """Say so if a generator is used after the first batch; the log says in which process."""
        first, last = parts[0][1][0], parts[-1][1][-1]
        logging.getLogger(__name__).warning(
            "the global generator of %s was used for the first time, by an item or by another thread of this process, "
            "while batch %d of this process was read (samples %d ... %d): that batch was read again, and the generator "
            "is seeded for each sample from now on",
            " and ".join(names),
            self._batches_read,
            first,
            last,
        )
