"""Build everything one rank's training loop needs: device, model, replica and data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from launcher.blocks import blocks_of, recompute
from launcher.data import Feed, collate_of, dataset_of, seed_from, transfer
from launcher.errors import RequestError
from launcher.hollow import hollow
from launcher.optim import Precision
from launcher.settings import Run
from launcher.strategies import Replica, prepare
from launcher.study import Sizes, Study
from launcher.telemetry import CudaTimer, HostTimer, StageClock
from launcher.timeline import Position, Update
from launcher.topology import Topology
from launcher.validate import Validation

__all__ = ["OpenData", "Parts", "assemble", "built", "check_norms", "device_of", "open_data"]


@dataclass(frozen=True)
class Parts:
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
    outline: Mapping[str, torch.Tensor]
    parameters: int
    trainable: int

    def feed(self, study: Study, topology: Topology, position: Position) -> Feed:
        return Feed.of(
            self.train_data,
            self.recipe,
            study.timeline,
            position,
            seed=study.run.seed,
            rank=topology.rank,
            data=study.run.data,
            pin=self.device.type == "cuda",
        )

    def validation(self, study: Study, topology: Topology) -> Validation | None:
        if not len(self.val_data):
            return None
        return Validation(
            self.val_data,
            self.recipe,
            rank=topology.rank,
            world=topology.world,
            chunks=study.run.elastic.shards if study.run.elastic.exact else topology.world,
            batch=study.plan.per_device,
            seed=study.run.seed,
            data=study.run.data,
            precision=self.precision,
            even=study.timeline.even,
        )


def device_of(run: Run, topology: Topology) -> torch.device:
    """Choose this rank's device and make it current.

    Raises:
        UsageError: CUDA is requested but unavailable, or there are fewer GPUs than workers on this machine.
    """
    wanted = run.train.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu" and run.launch.backend == "nccl":
        raise RequestError("launch.backend=nccl needs GPUs and training is on the CPU: type launch.backend=gloo")
    if wanted == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus < topology.local_world:
        raise RequestError(
            f"train.device={run.train.device}: {topology.local_world} workers on this machine but {gpus} GPUs: "
            f"start {gpus or 'no'} workers here, or type train.device=cpu"
        )
    device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class OpenData:
    train: Any
    val: Any


def open_data(recipe: Any, run: Run, sizes: Sizes) -> OpenData:
    """Open the training and validation datasets.

    Raises:
        UsageError: a dataset cannot be opened, or its length differs from the recipe's size().
    """
    opened = OpenData(dataset_of(recipe, "train", run.data.source), dataset_of(recipe, "val", run.data.source))
    for split, items, expected in (("train", opened.train, sizes.train), ("val", opened.val, sizes.val)):
        if len(items) != expected:
            raise RequestError(
                f"the recipe's {split} dataset has {len(items)} samples, but its size({split!r}) is {expected}"
            )
    return opened


def assemble(recipe: Any, run: Run, topology: Topology, device: torch.device, data: OpenData) -> Parts:
    """Build one rank's components. Every rank must call this: the replica broadcasts rank 0's parameters.

    Raises:
        UsageError: the optimizer cannot be built as configured, or `model.init` does not match the model.
    """
    precision = Precision.of(run.train.precision, device)
    model = hollow(recipe, run, topology.rank)
    if model is None:
        model = built(recipe, run)
    if precision.name == "fp64":
        model = model.double()
    model.train()
    outline = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    blocks = blocks_of(model, getattr(recipe, "blocks", None))
    if run.train.activation_checkpointing:
        recompute(blocks)
    if run.train.compile:
        model.compile()
    clock = StageClock(CudaTimer() if device.type == "cuda" else HostTimer())
    return Parts(
        recipe=recipe,
        device=device,
        precision=precision,
        clock=clock,
        replica=prepare(model, run, topology.world, precision, clock, getattr(recipe, "param_groups", None), blocks),
        train_data=data.train,
        val_data=data.val,
        outline=outline,
        parameters=sum(numel for numel, _ in counts),
        trainable=sum(numel for numel, trained in counts if trained),
    )


def built(recipe: Any, run: Run) -> nn.Module:
    """Build the model with its initial parameters."""
    torch.manual_seed(seed_from(run.seed, -1))
    model: nn.Module = recipe.model()
    initialise(model, run)
    return model


def initialise(model: nn.Module, run: Run) -> None:
    """Load initial parameters from `model.init`; with `model.strict=false` mismatched names are logged and skipped.

    Raises:
        UsageError: the file cannot be read, or does not match the model.
    """
    if run.model.init is None:
        return
    try:
        missing, unexpected = load_model(model, run.model.init, strict=run.model.strict)
    except (OSError, SafetensorError) as problem:
        raise RequestError(
            f"model.init={run.model.init} cannot be read: {problem}; name a safetensors file"
        ) from problem
    except RuntimeError as problem:
        why = " ".join(str(problem).split())
        raise RequestError(
            f"model.init={run.model.init} does not match the model: {why[:300]}; "
            f"type model.strict=false to load what fits"
        ) from problem
    if missing or unexpected:
        log = logging.getLogger("launcher")
        log.warning("model.init: missing in the file: %s; not in the model: %s", sorted(missing), sorted(unexpected))


def check_norms(parts: Parts, study: Study) -> None:
    """Detect, before training, a BatchNorm that would get a single value per channel in a micro-batch of one sample.

    Raises:
        UsageError: names the layer and the fix.
    """
    norms = {m: n for n, m in parts.replica.bare.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not norms or smallest_micro_batch(study) > 1:
        return
    items = collate_of(parts.recipe)([parts.train_data[0]])
    single = transfer(items, parts.device, parts.precision.dtype)
    called: list[str] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: called.append(norms[module])) for m in norms]
    before = {name: buffer.clone() for name, buffer in parts.replica.bare.named_buffers()}
    try:
        with torch.no_grad(), parts.precision.autocast():
            parts.recipe.loss(parts.replica.bare, single)
    except ValueError as problem:
        if "more than 1 value per channel" not in str(problem):
            raise
        raise RequestError(
            f"a micro-batch of 1 sample gives BatchNorm layer {called[-1]} a single value per channel: change "
            f"batch.per_device or train.duration to avoid that, type data.tail=carry, or use another norm layer"
        ) from problem
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for name, buffer in parts.replica.bare.named_buffers():
                buffer.copy_(before[name])


def smallest_micro_batch(study: Study) -> int:
    """The smallest micro-batch of the run; for very long runs, of the first 100,000 updates and the last epoch."""
    timeline = study.timeline
    updates: Iterable[Update] = islice(timeline.updates(), 100_000)
    if study.run.data.tail == "flush":
        last_epoch = (study.duration - 1) // study.sizes.train * study.sizes.train
        updates = chain(updates, timeline.updates(Position(last_epoch)))
    plans = {update.plan for update in updates}
    return min(min(plan.micro_batches(rank), default=plan.per_device) for plan in plans for rank in range(plan.world))
