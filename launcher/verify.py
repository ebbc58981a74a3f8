"""`launcher verify`: check that accumulation and splitting over workers give the gradient of the whole batch.

It runs the user's own recipe and data in fp64 in one process: the ranks' micro-batches come from real plans and run one
after the other. Only the order of summation differs from a real job.
"""

from __future__ import annotations

import copy
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from launcher import recipe as recipes
from launcher.assembly import built
from launcher.batch import BatchPlan, BatchPolicy, plan_batch
from launcher.data import AddressedDataset, collate_of, dataset_of, seed_from, transfer
from launcher.errors import RequestError
from launcher.loop import seed_generators
from launcher.order import Order
from launcher.settings import Run
from launcher.sinks.text import plural
from launcher.study import study
from launcher.timeline import MicroBatch, Timeline, Update

__all__ = ["MOST", "Verdict", "text", "verify"]

MOST = 64  # largest batch to split: enough samples for uneven splits, few enough to fit into any memory
TOLERANCE = 1e-12
LOSS = "loss"
#: (workers, micro-batches each): accumulation only, workers only, both, and unequal shares.
SPLITS = ((1, 2), (1, 4), (2, 1), (2, 3), (3, 1), (3, 2), (5, 1))
_CPU = torch.device("cpu")

MENDS = {
    "BatchNorm": "statistics are computed per micro-batch: use GroupNorm or LayerNorm, or torch.nn.SyncBatchNorm "
    "across workers; elastic.exact=true computes them over fixed shards",
    "Dropout": "draws a new mask for each micro-batch, as intended; the gradient is correct on average",
    LOSS: "loss() is not a sum over samples: return sums, not means; no sample's loss may depend on another",
}


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison.

    `relative` is the norm of the largest difference divided by the gradient's norm; `splits` are the compared plans.
    `offending_layers` lists layers, as `name (Class)`, whose outputs for the same inputs changed when the batch was
    split, and `loss` if the loss did.
    """

    max_abs_diff: float
    relative: float
    samples: int
    splits: tuple[BatchPlan, ...]
    breakers: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.relative <= TOLERANCE and not self.breakers

    @property
    def sound(self) -> bool:
        """Equal, or any difference is explained by layers; a loss that depends on the split is not acceptable."""
        return self.equal or (bool(self.breakers) and LOSS not in self.breakers)

    def document(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "max_abs_diff": self.max_abs_diff,
            "dtype": "float64",
            "breakers": list(self.breakers),
            "relative": self.relative,
            "samples": self.samples,
            "splits": [{"shares": list(plan.shares), "accumulation": plan.accumulation} for plan in self.splits],
        }


def verify(run: Run) -> Verdict:
    """Compare the gradient of one whole batch with the gradients of the batch split by several plans.

    Raises:
        UsageError: the recipe or configuration is invalid, or there are fewer than 2 samples to split.
    """
    recipe, run = recipes.build(run.recipe), with_any_rate(run)
    sizes = recipes.sizes(recipe)
    planned = study(run, sizes, run.launch.workers or 1).plan.global_batch
    samples = min(planned if planned > 1 else MOST, MOST, sizes.train)
    if samples < 2:
        raise RequestError(f"the training data has {sizes.train} samples: verify needs 2 or more to split")
    model = built(recipe, run).to(_CPU, torch.float64).train()
    trial = Trial(recipe, model, dataset_of(recipe, "train", run.data.source), run.seed)
    whole, plans = trial.update(BatchPlan(1, (samples,), samples, 1)), tuple(_plans(samples))
    expected = trial.gradient(whole)
    worst = largest = 0.0
    for plan in plans:
        off = trial.gradient(trial.update(plan)) - expected
        largest = max(largest, float(off.abs().max()))
        worst = max(worst, float(off.norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)))
    breakers = tuple(trial.breakers(whole, trial.update(plans[0]))) if worst > TOLERANCE else ()
    return Verdict(largest, worst, samples, plans, breakers)


def with_any_rate(run: Run) -> Run:
    """Fill in a learning rate if none is set: computing a gradient does not need one."""
    base, batch = run.lr.base, run.lr.base_batch
    return replace(
        run, lr=replace(run.lr, base=1.0 if base is None else base, base_batch=32 if batch is None else batch)
    )


def text(verdict: Verdict) -> str:
    """Format the result for a terminal."""
    lines = [f"One batch of {verdict.samples} samples whole, and split in {len(verdict.splits)} ways, in float64:"]
    lines += [f"- {_split(plan)}" for plan in verdict.splits]
    same = "the same gradient" if verdict.relative <= TOLERANCE else "different gradients"
    lines.append(f"{same}: they differ by {verdict.relative:.1e} of its norm, by {verdict.max_abs_diff:.1e} at most.")
    kinds: dict[str, list[str]] = {}
    for breaker in verdict.breakers:
        kinds.setdefault(_kind(breaker), []).append(breaker)
    for kind, layers in kinds.items():
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        lines.append(f"{', '.join(layers[:3])}{more}: {MENDS.get(kind, 'it mixes samples or is random')}")
    if not verdict.breakers and verdict.relative > TOLERANCE:
        lines.append("no layer explains the difference")
    wrapped = (textwrap.wrap(f"{line[:1].upper()}{line[1:]}", 80, subsequent_indent="  ") for line in lines)
    return "\n".join(line for part in wrapped for line in part) + "\n"


@dataclass(frozen=True)
class Trial:
    """A recipe and its initial model; trials leave both unchanged."""

    recipe: Any
    model: nn.Module
    items: Any
    seed: int

    def update(self, plan: BatchPlan) -> Update:
        """The run's first update under this plan; all plans with the same global batch use the same samples."""
        return next(Timeline(len(self.items), plan.global_batch, ((0, plan),)).updates())

    def gradient(self, update: Update) -> torch.Tensor:
        """All gradients as a flat vector: d(total)/samples summed over ranks, rescaled to a mean over the count."""
        model, count = copy.deepcopy(self.model), 0.0
        for micro in _micro_batches(update):
            loss = self.recipe.loss(model, self._batch(update, micro))
            (loss.total / update.samples).backward()
            count += float(loss.count)
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
        return torch.cat([part.reshape(-1) for part in parts]) * (update.samples / count)

    def breakers(self, whole: Update, split: Update) -> Iterator[str]:
        """Yield layers whose outputs for the same inputs depend on how the batch is split, then the loss if it does."""
        one, parts = copy.deepcopy(self.model), copy.deepcopy(self.model)
        reference = Outputs()
        with torch.no_grad(), _heard(one, reference.keep):
            expected = float(self.recipe.loss(one, self._batch(whole, *_micro_batches(whole))).total)
        total = 0.0
        compare = Comparison(reference)
        with torch.no_grad(), _heard(parts, compare):
            for micro in _micro_batches(split):
                compare.next_part(micro.size)
                total += float(self.recipe.loss(parts, self._batch(split, micro)).total)
        yield from compare.broken
        if abs(total - expected) > TOLERANCE * max(abs(expected), 1e-300) * 10:
            yield LOSS

    def _batch(self, update: Update, micro: MicroBatch) -> Any:
        """Build the micro-batch as the loader and training loop do, seeding each sample and each micro-batch."""
        orders = [(epoch, Order(update.size, self.seed, epoch)[start:stop]) for epoch, start, stop in micro.spans]
        addresses = [(epoch, sample) for epoch, samples in orders for sample in samples]
        items = AddressedDataset(self.items, self.seed).__getitems__(addresses)
        batch = transfer(collate_of(self.recipe)(items), _CPU, torch.float64)
        seed_generators(seed_from(self.seed, update.index, micro.place, micro.index), _CPU)
        return batch


Heard = Callable[[str, nn.Module, Any], Any]


class Outputs:
    """Records the output of each call of each layer, by layer name and call number."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], Any] = {}
        self._calls: Counter[str] = Counter()

    def keep(self, name: str, _: nn.Module, output: Any) -> None:
        self.outputs[name, self._calls[name]] = output
        self._calls[name] += 1


class Comparison:
    """Forward hook for the split batch: compares each layer's output with the whole batch and returns the latter.

    Every layer thus receives the same inputs as in the whole batch, so a layer that differs does not affect later ones.
    """

    def __init__(self, reference: Outputs) -> None:
        self.broken: list[str] = []
        self._reference = reference
        self._start = self._stop = 0
        self._calls: Counter[str] = Counter()

    def next_part(self, samples: int) -> None:
        self._start, self._stop = self._stop, self._stop + samples
        self._calls.clear()

    def __call__(self, name: str, layer: nn.Module, output: Any) -> Any:
        whole = self._reference.outputs.get((name, self._calls[name]))
        self._calls[name] += 1
        if not (isinstance(output, torch.Tensor) and isinstance(whole, torch.Tensor) and output.dim() and whole.dim()):
            return output
        before = whole[self._start : self._stop]
        if before.shape != output.shape or len(output) != self._stop - self._start:  # not a row per sample
            return output
        told = f"{name} ({type(layer).__name__})" if name else type(layer).__name__
        if not torch.allclose(before, output, rtol=1e-9, atol=1e-11) and told not in self.broken:
            self.broken.append(told)
        return before


@contextmanager
def _heard(model: nn.Module, heard: Heard) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda layer, _, output: heard(name, layer, output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in model.named_modules()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _micro_batches(update: Update) -> Iterator[MicroBatch]:
    """Yield all ranks' micro-batches in order of rank; a rank without samples contributes none."""
    for rank in range(update.plan.world):
        yield from (micro for micro in update.micro_batches(rank) if not micro.pad)


def _plans(samples: int) -> Iterator[BatchPlan]:
    """The splits with at least two samples per micro-batch, since BatchNorm rejects one; else 1 worker x 2."""
    fitting = [(world, steps) for world, steps in SPLITS if samples // (world * steps) >= 2] or [(1, 2)]
    for world, steps in fitting:
        cap = -(-samples // (world * steps))
        yield plan_batch(BatchPolicy("hold", per_device=cap, global_batch=samples, accumulation=steps), world)


def _split(plan: BatchPlan) -> str:
    shares = ", ".join(map(str, plan.shares))
    workers = plural(plan.world, "worker")
    return f"{workers}: {shares} samples in {plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''}"


def _kind(breaker: str) -> str:
    return next((kind for kind in MENDS if kind in breaker), breaker.rpartition("(")[2])
