"""Build everything one rank's training loop needs: device, model, replica and data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from launcher.config.schema import RunConfig
from launcher.errors import UsageError
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Position, Update
from launcher.plan.training_plan import DatasetSizes, TrainingPlan
from launcher.strategies.activation_checkpointing import apply_activation_checkpointing, find_blocks
from launcher.strategies.buffers import preserve_buffers
from launcher.strategies.extra_state import load_exported_model, split_extra_state
from launcher.strategies.interface import Replica, ReplicaArgs
from launcher.strategies.meta_init import build_on_meta_device
from launcher.strategies.model_checks import check_is_built, check_model
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import CudaTimer, HostTimer, StageClock
from launcher.topology import Topology
from launcher.train.data import MicroBatchLoader, get_dataset, to_device
from launcher.train.modes import enter_training_mode
from launcher.train.seeded_dataset import get_collate_fn
from launcher.train.seeding import MODEL_STREAM, derive_seed, seed_host_generators
from launcher.train.validation import Validator

__all__ = [
    "Datasets",
    "TrainComponents",
    "build_components",
    "build_model",
    "check_batchnorm_batch_size",
    "open_dataset",
    "open_datasets",
    "resolve_device",
]


@dataclass(frozen=True)
class TrainComponents:
    """One rank's model, data and stage clock.

    `meta_state_dict` is the recipe model's `state_dict()` on the meta device; `parameters` and `trainable` count
    elements. All three describe the model before the strategy wrapped or sharded it.
    """

    recipe: Any
    device: torch.device
    precision: Precision
    clock: StageClock
    replica: Replica
    train_data: Any
    val_data: Any
    meta_state_dict: Mapping[str, torch.Tensor]
    parameters: int
    trainable: int

    def make_loader(self, training_plan: TrainingPlan, topology: Topology, position: Position) -> MicroBatchLoader:
        return MicroBatchLoader.from_dataset(
            self.train_data,
            self.recipe,
            training_plan.timeline,
            position,
            training_plan.config,
            rank=topology.rank,
            pin=self.device.type == "cuda",
        )

    def make_validator(self, training_plan: TrainingPlan, topology: Topology) -> Validator | None:
        if not len(self.val_data):
            return None
        return Validator(self.val_data, self.recipe, training_plan, topology, self.precision)


def resolve_device(config: RunConfig, topology: Topology) -> torch.device:
    """Choose this rank's device and make it current.

    Raises:
        UsageError: CUDA is requested but unavailable, or there are fewer GPUs than workers on this machine.
    """
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and config.launch.backend == "nccl":
        raise UsageError("launch.backend=nccl needs GPUs and training is on the CPU: type launch.backend=gloo")
    if kind == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if not gpus:
        raise UsageError(f"train.device={config.train.device}: no GPU was found: type train.device=cpu")
    if gpus < topology.local_world:
        raise UsageError(
            f"train.device={config.train.device}: {topology.local_world} workers on this machine but {gpus} GPUs: "
            f"start {gpus} workers here, or type train.device=cpu"
        )
    device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Datasets:
    train: Any
    val: Any


def open_datasets(
    recipe: Any, config: RunConfig, sizes: DatasetSizes, opened: Mapping[str, Any] = MappingProxyType({})
) -> Datasets:
    """Open the training and validation datasets, except those that were `opened` to get their sizes.

    Raises:
        UsageError: a dataset cannot be opened, or its length differs from the recipe's size().
    """
    if config.data.source != "real":
        opened = {}
    train, val = (
        opened[split] if split in opened else open_dataset(recipe, split, config, size)
        for split, size in (("train", sizes.train), ("val", sizes.val))
    )
    return Datasets(train, val)


def open_dataset(recipe: Any, split: str, config: RunConfig, size: int) -> Any:
    """Open the data of one split, which must have `size` samples.

    Raises:
        UsageError: the dataset has no length and no `[i]`, or its length differs from the recipe's size().
    """
    items = get_dataset(recipe, split, config.data.source)
    if len(items) != size:
        raise UsageError(f"the recipe's {split} dataset has {len(items)} samples, but its size({split!r}) is {size}")
    return items


def build_components(
    recipe: Any, config: RunConfig, topology: Topology, device: torch.device, data: Datasets
) -> TrainComponents:
    """Build one rank's components. Every rank must call this: the replica broadcasts rank 0's parameters.

    Raises:
        UsageError: the model cannot be trained as it is, the optimizer cannot be built as configured, or `model.init`
            does not match the model.
    """
    precision = Precision.from_name(config.train.precision, device)
    model = build_on_meta_device(recipe, config, topology.rank)
    if model is None:
        model = build_model(recipe, config)
    if precision.name == "fp64":
        model = model.double()
    enter_training_mode(model)
    check_model(model, config, device)
    model_outline = {name: tensor.to("meta") for name, tensor in split_extra_state(model.state_dict())[0].items()}
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    blocks = find_blocks(model, getattr(recipe, "blocks", None))
    if config.train.activation_checkpointing:
        apply_activation_checkpointing(blocks)
    if config.train.compile:
        model.compile()
    clock = StageClock(CudaTimer() if device.type == "cuda" else HostTimer())
    return TrainComponents(
        recipe=recipe,
        device=device,
        precision=precision,
        clock=clock,
        replica=build_replica(
            ReplicaArgs(model, config, topology.world, precision, clock, getattr(recipe, "param_groups", None), blocks)
        ),
        train_data=data.train,
        val_data=data.val,
        meta_state_dict=model_outline,
        parameters=sum(numel for numel, _ in counts),
        trainable=sum(numel for numel, trained in counts if trained),
    )


def build_model(recipe: Any, config: RunConfig) -> nn.Module:
    """Build the model with its initial parameters."""
    seed = derive_seed(config.seed, MODEL_STREAM)
    torch.manual_seed(seed)
    seed_host_generators(seed)
    model: nn.Module = recipe.model()
    check_is_built(model)
    load_initial_parameters(model, config)
    return model


def load_initial_parameters(model: nn.Module, config: RunConfig) -> None:
    """Load initial parameters from `model.init`; with `model.strict=false` mismatched names are logged and skipped.

    Raises:
        UsageError: the file cannot be read, or does not match the model.
    """
    if config.model.init is None:
        return
    try:
        missing, unexpected = load_exported_model(model, config.model.init, strict=config.model.strict)
    except (OSError, SafetensorError) as problem:
        raise UsageError(
            f"model.init={config.model.init} cannot be read: {problem}; name a safetensors file"
        ) from problem
    except RuntimeError as problem:
        why = " ".join(str(problem).split())
        raise UsageError(
            f"model.init={config.model.init} does not match the model: {why[:300]}; "
            f"type model.strict=false to load what fits"
        ) from problem
    if missing or unexpected:
        log = logging.getLogger("launcher")
        log.warning("model.init: missing in the file: %s; not in the model: %s", sorted(missing), sorted(unexpected))


def check_batchnorm_batch_size(components: TrainComponents, training_plan: TrainingPlan) -> None:
    """Detect, before training, a BatchNorm that would get a single value per channel in a micro-batch of one sample.

    Raises:
        UsageError: names the layer and the fix.
    """
    check_sync_batchnorm_shares(components.replica.module, training_plan)
    model = components.replica.module
    all_norms = ((m, n) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norms = {module: name for module, name in all_norms if module.training}
    if not norms or compute_smallest_micro_batch(training_plan) > 1:
        return
    items = get_collate_fn(components.recipe)([components.train_data[0]])
    single = to_device(items, components.device, components.precision.dtype)
    called: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: called.append(norms[module])) for m in norms]
    try:
        with torch.no_grad(), components.precision.autocast(), preserve_buffers(model):
            components.replica.compute_loss(components.recipe.loss, single)
    except ValueError as problem:
        if "more than 1 value per channel" not in str(problem):
            raise
        raise UsageError(
            f"a micro-batch of 1 sample gives BatchNorm layer {called[-1]} a single value per channel: change "
            f"batch.per_device or train.duration to avoid that, type data.tail=carry, or use another norm layer"
        ) from problem
    finally:
        for hook in hooks:
            hook.remove()


def check_sync_batchnorm_shares(model: nn.Module, training_plan: TrainingPlan) -> None:
    """Detect, before training, a SyncBatchNorm that would wait for workers that have fewer micro-batches.

    Raises:
        UsageError: names the layer, the numbers of micro-batches and the fix.
    """
    name = next((n for n, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)), None)
    for plan in list_batch_plans(training_plan) if name is not None else ():
        counts = [len(plan.micro_batches(rank)) for rank in range(plan.world)]
        if len(set(counts)) > 1:
            raise UsageError(
                f"the model's {name} is a SyncBatchNorm, which needs the same number of micro-batches on every worker, "
                f"and an update of {plan.global_batch} samples has {max(counts)} on one and {min(counts)} on another: "
                "type data.tail=carry and a batch that the workers divide, or leave convert_sync_batchnorm out"
            )


def compute_smallest_micro_batch(training_plan: TrainingPlan) -> int:
    """The smallest micro-batch of the run."""
    plans = list_batch_plans(training_plan)
    return min(min(plan.micro_batches(rank), default=plan.per_device) for plan in plans for rank in range(plan.world))


def list_batch_plans(training_plan: TrainingPlan) -> list[BatchPlan]:
    """The different plans of the run's updates; for very long runs, of the first 100,000 and of the last epoch."""
    timeline = training_plan.timeline
    updates: Iterable[Update] = islice(timeline.iter_updates(), 100_000)
    if training_plan.config.data.tail == "flush":
        last_epoch = (training_plan.duration - 1) // training_plan.sizes.train * training_plan.sizes.train
        updates = chain(updates, timeline.iter_updates(Position(last_epoch)))
    by_identity = {id(update.plan): update.plan for update in updates}  # comparing plans costs O(world) per update
    return list(dict.fromkeys(by_identity.values()))
