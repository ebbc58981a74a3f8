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
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from launcher import recipe as recipes
from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.plan.batch import BatchPlan, BatchPolicy, plan_batch
from launcher.plan.sample_order import SamplePermutation
from launcher.plan.timeline import MicroBatch, Timeline, Update
from launcher.plan.training_plan import make_training_plan
from launcher.strategies.training_loss import read_training_loss
from launcher.system.formatting import format_plural
from launcher.train.build import build_model, open_dataset
from launcher.train.data import to_device
from launcher.train.micro_batches import seed_generators
from launcher.train.modes import enter_training_mode
from launcher.train.seeded_dataset import SeededDataset, get_collate_fn
from launcher.train.seeding import derive_seed

__all__ = ["MAX_SPLIT_BATCH", "VerifyResult", "format_verify_result", "verify"]

MAX_SPLIT_BATCH = 64  # largest batch to split: enough samples for uneven splits, few enough to fit into any memory
TOLERANCE = 1e-12
LOSS_LAYER = "loss"
#: (workers, micro-batches each): accumulation only, workers only, both, and unequal shares.
TRIAL_SPLITS = ((1, 2), (1, 4), (2, 1), (2, 3), (3, 1), (3, 2), (5, 1))
_CPU = torch.device("cpu")

FIXES_BY_LAYER = {
    "SyncBatchNorm": "each micro-batch has statistics of its own, over all workers in training (verify runs in one "
    "process): only accumulation changes the gradient, so keep batch.accumulation=1, or use GroupNorm or LayerNorm",
    "BatchNorm": "statistics are computed per micro-batch: use GroupNorm or LayerNorm, or torch.nn.SyncBatchNorm "
    "across workers; elastic.exact=true computes them over fixed shards",
    "Dropout": "draws a new mask for each micro-batch, as intended; the gradient is correct on average",
    LOSS_LAYER: "loss() is not a sum over samples: return sums, not means; no sample's loss may depend on another",
}


@dataclass(frozen=True)
class VerifyResult:
    """The result of a comparison.

    `relative` is the norm of the largest difference divided by the gradient's norm; `splits` are the compared plans.
    `offending_layers` lists layers, as `name (Class)`, whose outputs for the same inputs changed when the batch was
    split, and `loss` if the loss did.
    """

    max_abs_diff: float
    relative: float
    samples: int
    splits: tuple[BatchPlan, ...]
    offending_layers: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.relative <= TOLERANCE and not self.offending_layers

    @property
    def is_acceptable(self) -> bool:
        """Equal, or any difference is explained by layers; a loss that depends on the split is not acceptable."""
        return self.equal or (bool(self.offending_layers) and LOSS_LAYER not in self.offending_layers)

    def to_document(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "max_abs_diff": self.max_abs_diff,
            "dtype": "float64",
            "breakers": list(self.offending_layers),
            "relative": self.relative,
            "samples": self.samples,
            "splits": [{"shares": list(plan.shares), "accumulation": plan.accumulation} for plan in self.splits],
        }


def verify(config: RunConfig) -> VerifyResult:
    """Compare the gradient of one whole batch with the gradients of the batch split by several plans.

    Raises:
        UsageError: the recipe or configuration is invalid, or there are fewer than 2 samples to split.
    """
    recipe, config = recipes.build_recipe(config.recipe), with_dummy_lr(config)
    sizes = recipes.get_dataset_sizes(recipe)
    planned = make_training_plan(config, sizes, config.launch.workers or 1).batch_plan.global_batch
    samples = min(planned if planned > 1 else MAX_SPLIT_BATCH, MAX_SPLIT_BATCH, sizes.train)
    if samples < 2:
        raise UsageError(f"the training data has {sizes.train} samples: verify needs 2 or more to split")
    model = build_model(recipe, config).to(_CPU, torch.float64)
    enter_training_mode(model)
    trial = GradientTrial(recipe, model, open_dataset(recipe, "train", config, sizes.train), config.seed)
    whole, plans = trial.make_update(BatchPlan(1, (samples,), samples, 1)), tuple(_iter_plans(samples))
    expected = trial.compute_gradient(whole)
    worst = largest = 0.0
    for plan in plans:
        difference = trial.compute_gradient(trial.make_update(plan)) - expected
        largest = max(largest, float(difference.abs().max()))
        worst = max(worst, float(difference.norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)))
    offending_layers = (
        tuple(trial.iter_offending_layers(whole, trial.make_update(plans[0]))) if worst > TOLERANCE else ()
    )
    return VerifyResult(largest, worst, samples, plans, offending_layers)


def with_dummy_lr(config: RunConfig) -> RunConfig:
    """Fill in a learning rate if none is set: computing a gradient does not need one."""
    base, batch = config.lr.base, config.lr.base_batch
    return replace(
        config, lr=replace(config.lr, base=1.0 if base is None else base, base_batch=32 if batch is None else batch)
    )


def format_verify_result(result: VerifyResult) -> str:
    """Format the result for a terminal."""
    lines = [f"One batch of {result.samples} samples whole, and split in {len(result.splits)} ways, in float64:"]
    lines += [f"- {_format_split(plan)}" for plan in result.splits]
    conclusion = "the same gradient" if result.relative <= TOLERANCE else "different gradients"
    lines.append(
        f"{conclusion}: they differ by {result.relative:.1e} of its norm, by {result.max_abs_diff:.1e} at most."
    )
    layers_by_kind: dict[str, list[str]] = {}
    for layer in result.offending_layers:
        layers_by_kind.setdefault(_get_kind(layer), []).append(layer)
    for kind, layers in layers_by_kind.items():
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        lines.append(f"{', '.join(layers[:3])}{more}: {FIXES_BY_LAYER.get(kind, 'it mixes samples or is random')}")
    if not result.offending_layers and result.relative > TOLERANCE:
        lines.append("no layer explains the difference")
    wrapped = (textwrap.wrap(f"{line[:1].upper()}{line[1:]}", 80, subsequent_indent="  ") for line in lines)
    return "\n".join(line for part_lines in wrapped for line in part_lines) + "\n"


@dataclass(frozen=True)
class GradientTrial:
    """A recipe and its initial model; trials leave both unchanged."""

    recipe: Any
    model: nn.Module
    items: Any
    seed: int

    def make_update(self, plan: BatchPlan) -> Update:
        """The run's first update under this plan; all plans with the same global batch use the same samples."""
        return next(Timeline(len(self.items), plan.global_batch, ((0, plan),)).iter_updates())

    def compute_gradient(self, update: Update) -> torch.Tensor:
        """All gradients as a flat vector: d(total)/samples summed over ranks, rescaled to a mean over the count."""
        model, count = copy.deepcopy(self.model), 0.0
        for micro in _iter_micro_batches(update):
            loss = read_training_loss(self.recipe.loss(model, self._make_batch(update, micro)))
            count += loss.count
            if loss.total.requires_grad and (loss.count or bool(torch.isfinite(loss.total))):
                (loss.total / update.samples).backward()
        if not count:
            raise UsageError(
                f"recipe.loss counts 0 over the first {update.samples} samples: verify needs samples with a target: "
                "type a larger batch.global or another seed"
            )
        gradients = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad
        ]
        return torch.cat([gradient.reshape(-1) for gradient in gradients]) * (update.samples / count)

    def iter_offending_layers(self, whole: Update, split: Update) -> Iterator[str]:
        """Yield layers whose outputs for the same inputs depend on how the batch is split, then the loss if it does."""
        whole_model, split_model = copy.deepcopy(self.model), copy.deepcopy(self.model)
        reference = OutputRecorder()
        with torch.no_grad(), _hook_outputs(whole_model, reference.record):
            expected = float(self.recipe.loss(whole_model, self._make_batch(whole, *_iter_micro_batches(whole))).total)
        total = 0.0
        compare = OutputComparison(reference)
        with torch.no_grad(), _hook_outputs(split_model, compare):
            for micro in _iter_micro_batches(split):
                compare.start_next_part(micro.size)
                total += float(self.recipe.loss(split_model, self._make_batch(split, micro)).total)
        yield from compare.offending_layers
        if abs(total - expected) > TOLERANCE * max(abs(expected), 1e-300) * 10:
            yield LOSS_LAYER

    def _make_batch(self, update: Update, micro: MicroBatch) -> Any:
        """Build the micro-batch as the loader and training loop do, seeding each sample and each micro-batch."""
        samples_by_epoch = [
            (epoch, SamplePermutation(update.size, self.seed, epoch)[start:stop]) for epoch, start, stop in micro.spans
        ]
        batches = SeededDataset(self.items, self.seed, get_collate_fn(self.recipe))
        batch = to_device(batches.__getitems__(samples_by_epoch), _CPU, torch.float64)
        seed_generators(derive_seed(self.seed, update.index, micro.shard, micro.index), _CPU)
        return batch


OutputHook = Callable[[str, nn.Module, Any], Any]


class OutputRecorder:
    """Records the output of each call of each layer, by layer name and call number."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[str, int], Any] = {}
        self._calls: Counter[str] = Counter()

    def record(self, name: str, _: nn.Module, output: Any) -> None:
        self.outputs[name, self._calls[name]] = tree_map_only(torch.Tensor, torch.clone, output)  # may change in place
        self._calls[name] += 1


class OutputComparison:
    """Forward hook for the split batch: compares each layer's output with the whole batch and returns the latter.

    Every layer thus receives the same inputs as in the whole batch, so a layer that differs does not affect later ones.
    """

    def __init__(self, reference: OutputRecorder) -> None:
        self.offending_layers: list[str] = []
        self._reference = reference
        self._start = self._stop = 0
        self._calls: Counter[str] = Counter()

    def start_next_part(self, samples: int) -> None:
        self._start, self._stop = self._stop, self._stop + samples
        self._calls.clear()

    def __call__(self, name: str, layer: nn.Module, output: Any) -> Any:
        whole, form = tree_flatten(self._reference.outputs.get((name, self._calls[name])))
        self._calls[name] += 1
        parts, own_form = tree_flatten(output)
        if form != own_form:
            return output
        layer_name = f"{name} ({type(layer).__name__})" if name else type(layer).__name__
        return tree_unflatten(
            [self._compare(layer_name, *tensors) for tensors in zip(whole, parts, strict=True)], own_form
        )

    def _compare(self, layer_name: str, whole: Any, part: Any) -> Any:
        """Note the layer if this part of its output differs; return a copy of the part of the whole batch's output."""
        if not (isinstance(part, torch.Tensor) and isinstance(whole, torch.Tensor) and part.dim() and whole.dim()):
            return part
        before = whole[self._start : self._stop]
        if before.shape != part.shape or len(part) != self._stop - self._start:  # not a row per sample
            return part
        if not torch.allclose(before, part, rtol=1e-9, atol=1e-11) and layer_name not in self.offending_layers:
            self.offending_layers.append(layer_name)
        return before.clone()  # the model may change it in place


@contextmanager
def _hook_outputs(model: nn.Module, on_output: OutputHook) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        return lambda layer, _, output: on_output(name, layer, output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in model.named_modules()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _iter_micro_batches(update: Update) -> Iterator[MicroBatch]:
    """Yield all ranks' micro-batches in order of rank; a rank without samples contributes none."""
    for rank in range(update.plan.world):
        yield from (micro for micro in update.micro_batches(rank) if not micro.is_padding)


def _iter_plans(samples: int) -> Iterator[BatchPlan]:
    """The splits with at least two samples per micro-batch, since BatchNorm rejects one; else 1 worker x 2."""
    fitting = [(world, steps) for world, steps in TRIAL_SPLITS if samples // (world * steps) >= 2] or [(1, 2)]
    for world, steps in fitting:
        cap = -(-samples // (world * steps))
        yield plan_batch(BatchPolicy("hold", per_device=cap, global_batch=samples, accumulation=steps), world)


def _format_split(plan: BatchPlan) -> str:
    shares = ", ".join(map(str, plan.shares))
    workers = format_plural(plan.world, "worker")
    return f"{workers}: {shares} samples in {plan.accumulation} micro-batch{'es' if plan.accumulation > 1 else ''}"


def _get_kind(layer: str) -> str:
    """The kind of a layer, given as `name (Class)` or `Class`, that its fix is listed by."""
    class_name = layer.rpartition("(")[2].rstrip(")")
    return next((kind for kind in FIXES_BY_LAYER if kind in class_name), class_name)
