"""Compare, once, the loss of a micro-batch with the losses of its two halves: a sum over samples adds up.

The division by the whole batch's samples, and so the gradient at any number of workers, relies on that. A mean, its
square root, or a mean beside a sum do not add up. `launcher verify` compares gradients, and names layers.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from launcher.distributed.store_gather import StoreGather
from launcher.plan.sample_order import SamplePermutation
from launcher.strategies.buffers import preserve_buffers
from launcher.strategies.interface import LARGE_MODEL_BYTES
from launcher.train.context import TrainContext
from launcher.train.data import make_data_loader, to_device
from launcher.train.micro_batches import seed_generators
from launcher.train.modes import evaluation_mode
from launcher.train.seeded_dataset import SeededDataset, get_collate_fn
from launcher.train.seeding import LOSS_CHECK_STREAM, derive_seed

__all__ = ["LossSplit", "describe_split", "find_scaling_problem"]

MAX_SAMPLES = 16
TOLERANCE = {"fp64": 1e-6, "fp32": 2e-3}
LOW_PRECISION_TOLERANCE = 0.02
#: For losses that are random, or whose model mixes samples in training mode: less than a mean's difference, 0.5.
COARSE_TOLERANCE = 0.25
#: How long a rank whose forward pass failed waits for the others to end theirs.
FAILED_WAIT_S = 60.0

#: Total and count of a batch.
Sums = tuple[float, float]
ComputeFn = Callable[[Any], Any]


@dataclass(frozen=True)
class LossSplit:
    """The loss of a batch of `samples`, of its two halves, and of the whole once more with other random numbers."""

    samples: int
    whole: Sums
    halves: tuple[Sums, Sums]
    again: Sums

    @property
    def is_conclusive(self) -> bool:
        """Whether the values can be compared: they are finite, and something was counted."""
        values = (*self.whole, *self.halves[0], *self.halves[1], *self.again)
        return all(map(math.isfinite, values)) and self.whole[1] > 0


def describe_split(split: LossSplit, tolerance: float) -> str | None:
    """Describe how the loss fails to add up, to complete a sentence; None if it adds up or cannot be compared."""
    if not split.is_conclusive:
        return None
    (total, count), (first, second) = split.whole, split.halves
    if abs(count - first[1] - second[1]) > 1e-6 * count:
        return (
            f"counts {count:g} in {split.samples} samples, but {first[1]:g} and {second[1]:g} in their two halves: "
            "return as count the number of samples or tokens that total sums over"
        )
    parts, scale = first[0] + second[0], max(abs(total), abs(first[0]) + abs(second[0]))
    noise = abs(total - split.again[0])
    allowed = tolerance * scale if noise <= tolerance / 10 * scale else max(COARSE_TOLERANCE * scale, 4 * noise)
    if abs(total - parts) <= allowed:
        return None
    return (
        f"does not add up: its total of {split.samples} samples is {format_ratio(total, parts)}, so that the gradient "
        "depends on how a batch is divided into micro-batches and over workers: return the sum of each sample's own "
        "loss, e.g. by reduction='sum'; launcher verify shows more"
    )


def format_ratio(total: float, parts: float) -> str:
    """Compare the total of the whole with the sum of its halves' totals, and say which way it scales."""
    if total * parts <= 0:
        return f"{total:.4g} and the sum of its two halves' totals {parts:.4g}"
    ratio = total / parts
    if 0.4 < ratio < 0.6:
        way = "like a mean, it does not grow with the number of samples"
    elif 0.65 < ratio < 0.78:
        way = "it grows with the square root of the number of samples"
    elif ratio < 1:
        way = "it, or a part of it, grows more slowly than the number of samples"
    else:
        way = "it grows faster than the number of samples, as where samples of a batch are compared with each other"
    return f"{ratio:.3g} times the sum of its two halves' totals ({way})"


def find_scaling_problem(context: TrainContext, items: Any, store_gather: StoreGather) -> tuple[str | None, bool]:
    """Compare a micro-batch of the training data `items` with its halves, in evaluation mode and as in training.

    Returns what is wrong, to complete a sentence, and whether the comparison was possible. It leaves model, buffers and
    generators as they were. Every rank must call this, and computes the same: model or loss may communicate. Where one
    fails, all go on without the comparison; training will meet the error too, and reports it.

    Raises:
        Exception: a forward pass failed where other ranks may be waiting in it.
    """
    samples = min(MAX_SAMPLES, max(2, context.training_plan.batch_plan.per_device), len(items))
    if samples < 2:
        return None, False
    with preserve_generators(), torch.no_grad():
        load = partial(load_batches, context, items, samples)
        batches = try_to_load(store_gather, load, context.config.launch.timeout_s)
        measure = partial(measure_both, context, batches or [], samples)
        splits = None if batches is None else try_to_compute(context, store_gather, measure)
    if splits is None:
        return None, False
    tolerance = TOLERANCE.get(context.precision.name, LOW_PRECISION_TOLERANCE)
    if context.config.strategy.param_dtype == "bf16":
        tolerance = LOW_PRECISION_TOLERANCE
    tolerances = (tolerance, COARSE_TOLERANCE)
    problems = [describe_split(split, allowed) for split, allowed in zip(splits, tolerances, strict=True)]
    return next(filter(None, problems), None), all(split.is_conclusive for split in splits)


def try_to_load(store_gather: StoreGather, load: Callable[[], list[Any]], within_s: float) -> list[Any] | None:
    """The batches if every rank could load them; else None on every rank.

    Raises:
        RuntimeError: another rank has not tried within `within_s` seconds.
    """
    batches = None
    with suppress(Exception):
        batches = load()
    return batches if all(store_gather.gather(batches is not None, within_s)) else None


def try_to_compute(
    context: TrainContext, store_gather: StoreGather, compute: Callable[[], list[LossSplit]]
) -> list[LossSplit] | None:
    """The result of `compute` if no rank failed in it; else None on every rank.

    Raises:
        Exception: what failed here, where the other ranks do not end, since they wait for this one in a collective of
            the loss; or where a sharded model did not fail in the same place on all of them.
    """
    try:
        splits = compute()
    except Exception as error:
        try:
            places = store_gather.gather(locate_error(error, context.topology.rank), FAILED_WAIT_S)
        except RuntimeError:
            raise error from None
        if context.replica.sharded and len(set(places)) > 1:  # collectives that only some ranks began
            raise
        return None
    return None if any(store_gather.gather(0.0, context.config.launch.timeout_s)) else splits


def locate_error(error: Exception, rank: int) -> float:
    """A number above 0 for the lines in which an error was raised; each rank's own where memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return rank + 1.0
    lines = [(frame.f_code.co_name, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return float(zlib.crc32(repr((type(error).__name__, lines)).encode()) + 2**32)


def measure_both(context: TrainContext, batches: list[Any], samples: int) -> list[LossSplit]:
    """The comparison in evaluation mode, and with the model itself in training mode."""
    with prepare_model(context) as (model, compute):
        in_eval = measure_split(context, compute, batches, samples)
        model.training = True  # only the model itself: Dropout and BatchNorm would make the loss random
        return [in_eval, measure_split(context, compute, batches, samples)]


def load_batches(context: TrainContext, items: Any, samples: int) -> list[Any]:
    """The run's first samples as one batch, in another order, and as two halves.

    They are read in a loader process if the run has any, so that the dataset opens its files as it does in training.
    """
    config, device = context.config, context.precision.device
    order = SamplePermutation(len(items), config.seed, 0)[:samples]
    batches = [order, [*order[1:], order[0]], order[: samples // 2], order[samples // 2 :]]
    data = replace(config.data, num_workers=min(1, config.data.num_workers))
    dataset = SeededDataset(items, config.seed, get_collate_fn(context.recipe))
    loader = make_data_loader(dataset, [[(0, batch)] for batch in batches], data, pin=False)
    return [to_device(batch, device, context.precision.dtype) for batch in loader]


@contextmanager
def prepare_model(context: TrainContext) -> Iterator[tuple[nn.Module, ComputeFn]]:
    """A model in evaluation mode, and a function that computes the recipe's loss with it.

    It is a copy if that is possible, since a forward pass may change more than buffers.
    """
    replica, recipe = context.replica, context.recipe
    model = None if replica.sharded else copy_small_model(replica.module)
    with ExitStack() as stack:
        if context.config.train.compile:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # other shapes would slow down training
        stack.enter_context(context.precision.autocast())
        if model is not None:
            model.eval()
            yield model, lambda batch: recipe.loss(model, batch)
        else:
            stack.enter_context(preserve_buffers(replica.module))
            stack.enter_context(evaluation_mode(replica.module))
            yield replica.module, lambda batch: replica.compute_loss(recipe.loss, batch)


def copy_small_model(model: nn.Module) -> nn.Module | None:
    """A copy of the model; None if it is large or cannot be copied."""
    if sum(parameter.nbytes for parameter in model.parameters()) > LARGE_MODEL_BYTES:
        return None
    try:
        return copy.deepcopy(model)
    except Exception:  # a model may hold anything
        return None


def measure_split(context: TrainContext, compute: ComputeFn, batches: list[Any], samples: int) -> LossSplit:
    """Compute the loss of each batch; whole and halves with the same seed."""
    sums: list[Sums] = []
    for batch, stream in zip(batches, (0, 1, 0, 0), strict=True):
        seed_generators(derive_seed(context.config.seed, LOSS_CHECK_STREAM, stream), context.precision.device)
        loss = compute(batch)
        sums.append((float(loss.total), float(loss.count)))
    whole, again, first, second = sums
    return LossSplit(samples, whole, (first, second), again)


@contextmanager
def preserve_generators() -> Iterator[None]:
    """Restore the state of the global random generators after the block."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])
