"""The events that rank 0 logs when training starts: start, the current plan, and resume or resize if they apply."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from launcher.checkpoint.manifest import VerifiedCheckpoint
from launcher.plan.training_plan import DatasetSizes
from launcher.run_dir.restart_cost import RestartCost
from launcher.system.processes import count_cores
from launcher.train.build import TrainComponents
from launcher.train.context import TrainContext
from launcher.train.metrics_recorder import plan_to_dict
from launcher.train.modes import describe_untrained_modes, find_modules_in_eval
from launcher.train.rank_setup import RankJob
from launcher.train.state import TrainState

__all__ = ["log_start_events"]


def log_start_events(
    job: RankJob,
    context: TrainContext,
    components: TrainComponents,
    state: TrainState,
    backend: str,
    restart_cost: RestartCost,
) -> None:
    """Log the start events: start, the current plan, and resume or resize if they apply."""
    if context.logger is None:
        return
    checkpoint = job.setup.checkpoint
    goodput_why = "" if context.goodput is None else context.goodput.why
    plan = plan_to_dict(
        context.training_plan, state.schedule, context.training_plan.batch_plan_at(state.position.samples)
    )
    logged_plan = job.spec.run_dir.read_plan()  # read before the plan event, which overwrites it
    start = make_start_facts(context, components, state)
    run_dir = str(job.spec.run_dir.path)
    context.log_event("start", run_dir=run_dir, backend=backend, threads=job.threads, **start)
    context.log_event("plan", why="; ".join(filter(None, (goodput_why, job.spec.why))), **plan, **{"from": None})
    modes = describe_untrained_modes(components.replica.module) if context.topology.generation == 1 else None
    if modes is not None:
        context.log_event("alarm", kind="eval_mode", detail=modes)
    if checkpoint is not None:
        resume = make_resume_facts(checkpoint, state)
        context.log_event("resume", **resume, changed=job.spec.changed, lost_samples=restart_cost.lost_samples)
        for detail in iter_checkpoint_warnings(checkpoint, state):
            context.log_event("alarm", kind="checkpoint", detail=detail)
        for detail in iter_data_warnings(checkpoint, context.training_plan.sizes):
            context.log_event("alarm", kind="data", detail=detail)
    previous = find_previous_plan(checkpoint, logged_plan)
    if previous and any(previous[name] != plan[name] for name in ("world", "global", "lr_scale")):
        moments = state.second_moment_factor(plan["global"])
        why = "; ".join(filter(None, (describe_resize(previous, plan), goodput_why)))
        context.log_event("resize", why=why, **{"from": previous, "to": plan}, moments=moments)


def make_start_facts(context: TrainContext, components: TrainComponents, state: TrainState) -> dict[str, Any]:
    """The fields of the start event."""
    plan, config, position = context.training_plan, context.config, state.position
    device = context.precision.device
    return {
        "recipe": type(components.recipe).__name__,
        "data": {"train": plan.sizes.train, "val": plan.sizes.val},
        "parameters": components.parameters,
        "trainable": components.trainable,
        "in_eval_mode": find_modules_in_eval(components.replica.module),
        "strategy": config.strategy.name,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "precision": config.train.precision,
        "world": context.topology.world,
        "nodes": context.topology.nodes,
        "cores": count_cores(),
        "seed": config.seed,
        "duration_samples": plan.duration,
        "updates": position.update + plan.timeline.count_updates(position),
        "updates_per_epoch": plan.sizes.train / plan.batch_plan.global_batch,
        "generation": context.topology.generation,
        "optimizer": type(context.replica.optimizer).__name__,
        "decay": config.schedule.decay,
    }


def make_resume_facts(checkpoint: VerifiedCheckpoint, state: TrainState) -> dict[str, Any]:
    """The fields of the resume event."""
    return {
        "checkpoint": checkpoint.path.name,
        "samples": state.position.samples,
        "update": state.position.update,
        "passed_over": [{"name": name, "why": why} for name, why in checkpoint.skipped],
    }


def iter_checkpoint_warnings(checkpoint: VerifiedCheckpoint, state: TrainState) -> Iterator[str]:
    """Yield warnings about checkpoints that are missing or were skipped."""
    best = checkpoint.manifest.facts["standing"]["best_checkpoint"]
    if best != state.best_checkpoint:
        yield f"the best checkpoint so far, {best}, is missing from this run's directory"
    for name, why in checkpoint.skipped:
        yield f"{name} was passed over: {why}"


def iter_data_warnings(checkpoint: VerifiedCheckpoint, sizes: DatasetSizes) -> Iterator[str]:
    """Yield a warning if the validation data has another length than when the checkpoint was saved."""
    was = checkpoint.manifest.facts.get("data", {}).get("val", sizes.val)
    if was != sizes.val:
        yield (
            f"the validation data has {sizes.val} samples now, and had {was} when {checkpoint.path.name} was saved: "
            f"its metrics of before and of now are not comparable"
        )


def find_previous_plan(
    checkpoint: VerifiedCheckpoint | None, logged_plan: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The plan before this start: the checkpoint's, or the last logged one if the world size has changed since."""
    if checkpoint is None or (logged_plan is not None and logged_plan["world"] != checkpoint.manifest.plan["world"]):
        return logged_plan
    return dict(checkpoint.manifest.plan)


def describe_resize(previous: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    if previous["world"] != plan["world"]:
        return f"{previous['world']} workers before, {plan['world']} now"
    return "the plan changed at the same number of workers"
