"""Runs training on one rank, from process-group setup to the final event."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from launcher.distributed.stop_requests import JOIN, LEAVE

if TYPE_CHECKING:
    from launcher.train.loop import TrainContext
    from launcher.train.state import TrainState
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher import recipe as recipes
from launcher.checkpoint import tensor_io
from launcher.checkpoint.manifest import VerifiedCheckpoint, latest_valid, open_checkpoint
from launcher.config.keys import flatten
from launcher.config.schema import RunConfig
from launcher.distributed import rendezvous
from launcher.distributed.consistency_check import check_ranks_agree
from launcher.distributed.join_gate import GATE_POLL_S
from launcher.distributed.load_balancing import LoadBalancer, NullBalancer
from launcher.distributed.rank_stats import StatsAllGather
from launcher.distributed.stop_requests import GO_ON, StopRequests
from launcher.distributed.watchdog import NullWatchdog, Watchdog
from launcher.distributed.worker_env import num_threads
from launcher.errors import EXIT_OK, EXIT_RESTART, UsageError
from launcher.goodput.policy import BatchChooser, GoodputPolicy, NullGoodputPolicy, TimingProfile
from launcher.plan.timeline import Position
from launcher.plan.training_plan import DatasetSizes, TrainingPlan, make_training_plan
from launcher.run_dir import failures
from launcher.run_dir.restart_cost import RestartCost, read_last_row, sum_restart_costs
from launcher.strategies.interface import LARGE_MODEL_BYTES
from launcher.system.fault_injection import FaultInjector
from launcher.system.redaction import mask_nested_secrets
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.telemetry.resource_meter import ResourceMeter
from launcher.telemetry.sinks import SinkContext, open_sinks
from launcher.topology import Topology
from launcher.train.assignment import JobSpec
from launcher.train.build import (
    Datasets,
    TrainComponents,
    build_components,
    check_batchnorm_batch_size,
    open_datasets,
    resolve_device,
)
from launcher.train.checkpoint_manager import CheckpointManager, checkpoint_name
from launcher.train.loop import REPLAN, TrainContext, train
from launcher.train.loss_check import RecipeWithLossCheck
from launcher.train.metrics_recorder import MetricsRecorder, NullRecorder, plan_to_dict
from launcher.train.state import TrainState

__all__ = ["JOIN_TIMEOUT_S", "admit_waiting_nodes", "run"]


@dataclass(frozen=True)
class RankSetup:
    """What a rank prepares before it joins the others, so that its errors do not leave them waiting."""

    recipe: Any
    sizes: DatasetSizes
    device: torch.device
    data: Datasets
    found: VerifiedCheckpoint | None
    folder_generation: int

    def collect_facts(self) -> Mapping[str, Any]:
        """The values that must be equal on all ranks."""
        return {
            "the launcher's version": version("elastic-batch-launcher"),
            "torch's version": torch.__version__,
            "python's version": platform.python_version(),
            "the training data's length": self.sizes.train,
            "the validation data's length": self.sizes.val,
            "the generation in the run folder": self.folder_generation,
            "the newest checkpoint": None if self.found is None else self.found.path.name,
        }


def run(
    job_spec: JobSpec,
    topology: Topology,
    store: dist.Store,
    stop_requests: StopRequests,
    heart: Watchdog | NullWatchdog,
) -> int:
    """Build, restore, train, finish; return the exit status.

    Raises:
        UsageError: any rank found a configuration error before training.
    """
    settings = job_spec.config
    faults = FaultInjector.from_env(topology.rank, topology.generation)
    faults("start")
    threads = num_threads(settings, topology.local_world)
    torch.set_num_threads(threads)
    ready = check_ranks_agree(store, topology, lambda: prepare_rank(job_spec, topology), RankSetup.collect_facts)
    goodput, chosen = make_goodput_policy(job_spec, ready, topology)
    plan = make_training_plan(chosen, ready.sizes, topology.world)
    heart.enter_phase("rendezvous")
    faults("rendezvous")
    backend = rendezvous.init_process_group(
        store, topology, ready.device, settings.launch.backend, settings.launch.timeout_s
    )
    components = build_components(ready.recipe, settings, topology, ready.device, ready.data)
    heart.enter_phase("restore")
    faults("restore")
    state = restore_state(
        components, plan, ready.found, job_spec.run_dir.resolve_checkpoints_dir(settings.checkpoint.dir)
    )
    check_batchnorm_batch_size(components, plan)

    restart = compute_restart_cost(job_spec, state) if topology.rank == 0 else RestartCost()
    journal = open_journal(job_spec) if topology.rank == 0 else NullRecorder()
    checkpoint_manager = make_checkpoint_manager(job_spec, plan, components, journal, topology, faults)
    recorder = make_recorder(plan, journal, topology, checkpoint_manager, restart)
    try:
        context = make_context(
            topology,
            plan,
            components,
            checkpoint_manager,
            recorder,
            stop_requests,
            faults,
            heart,
            state,
            threads,
            goodput,
        )
        log_start_events(context, components, job_spec, ready, state, backend, threads, restart)
        stop_requests.handle_sigterm()
        state, ending = train(context, state)
        while ending in (REPLAN, JOIN):
            if ending == JOIN and (ending := admit_waiting_nodes(context, state)) == LEAVE:
                break
            if ending == REPLAN:
                context, state = replan(context, state)
            context = continue_with_plan(context, components, state)
            state, ending = train(context, state)
        heart.enter_phase("finish")
        checkpoint_manager.wait()
        faults("finish")
        if topology.rank == 0:
            finish_run(context, job_spec, ready.found, state, ending)
    except BaseException as error:
        heart.stop()
        recorder.flush_unfinished()
        log_failure(error, job_spec, journal, topology)
        raise
    finally:
        checkpoint_manager.close()
        journal.close()
    heart.enter_wait()
    dist.barrier()
    dist.destroy_process_group()
    heart.stop(finished=True)
    return EXIT_RESTART if ending == LEAVE else EXIT_OK


def log_failure(
    error: BaseException, job_spec: JobSpec, journal: MetricsLogger | NullRecorder, topology: Topology
) -> None:
    """Log an error; if another rank died, log only an alarm: that rank reports the cause."""
    found = failures.RankFailure.from_exception(
        *topology.rank_and_generation, error, job_spec.run_dir.get_log_path(*topology.rank_and_generation)
    )
    if failures.is_peer_failure(found.message):
        journal.log_event("alarm", kind="peer", detail="lost connection to another worker", message=found.message)
    else:
        journal.log_event("error", **found.to_event().fields)


def prepare_rank(job_spec: JobSpec, topology: Topology) -> RankSetup:
    settings = job_spec.config
    recipe = recipes.build_recipe(settings.recipe)
    sizes = recipes.get_dataset_sizes(recipe)
    return RankSetup(
        recipe=recipe,
        sizes=sizes,
        device=resolve_device(settings, topology),
        data=open_datasets(recipe, settings, sizes),
        found=find_checkpoint(job_spec),
        folder_generation=job_spec.run_dir.read_generation(),
    )


def find_checkpoint(job_spec: JobSpec) -> VerifiedCheckpoint | None:
    """The checkpoint to resume from: at the first start of the job the one the user named, else the newest in the run.

    Raises:
        UsageError: all checkpoints are corrupt, or there is none and `resume=must`.
    """
    if job_spec.checkpoint is not None:
        return open_checkpoint(job_spec.checkpoint)
    found = latest_valid(job_spec.run_dir.resolve_checkpoints_dir(job_spec.config.checkpoint.dir))
    if found is None and job_spec.require_checkpoint:
        raise UsageError(f"resume=must: {job_spec.run_dir.path} contains no checkpoint: type resume=auto")
    return found


def restore_state(
    components: TrainComponents, plan: TrainingPlan, found: VerifiedCheckpoint | None, checkpoints: Path
) -> TrainState:
    """Restore the training state from the checkpoint, or create the initial one.

    The best checkpoint so far is kept only if it still exists in `checkpoints`.
    """
    if found is None:
        return TrainState.initial(plan)
    tensor_io.check_tensor_names(found.manifest, components.meta_state_dict)
    loaded = tensor_io.load_checkpoint(found)
    facts = loaded.manifest.facts
    components.replica.restore(loaded.model, loaded.optimizer, facts)
    state = TrainState.from_state_dict(plan, Position(**loaded.manifest.position), facts["standing"])
    if state.best_checkpoint is not None and not (checkpoints / state.best_checkpoint).is_dir():
        return replace(state, best=None, best_checkpoint=None)
    return state


def open_journal(job_spec: JobSpec) -> MetricsLogger:
    run_dir = job_spec.run_dir
    to = SinkContext(
        folder=run_dir.path,
        name=str(job_spec.config.run.name),
        wandb_id=run_dir.ensure_wandb_id(),
        config=dict(mask_nested_secrets(flatten(job_spec.config))),
    )
    return MetricsLogger(open_sinks(job_spec.config.sink, to))


def compute_restart_cost(job_spec: JobSpec, state: TrainState) -> RestartCost:
    """The cost of the restart; resuming from a checkpoint that the user named counts as losing nothing."""
    if job_spec.generation == 1 or job_spec.checkpoint is not None:
        return RestartCost()
    row = read_last_row(job_spec.run_dir.metrics)
    return RestartCost.from_last_row(row, state.position.samples, restarted=job_spec.restarted)


def make_checkpoint_manager(
    job_spec: JobSpec,
    plan: TrainingPlan,
    components: TrainComponents,
    journal: MetricsLogger | NullRecorder,
    topology: Topology,
    faults: FaultInjector,
) -> CheckpointManager:
    return CheckpointManager(
        job_spec.run_dir,
        plan.config.checkpoint,
        journal,
        rank=topology.rank,
        world=topology.world,
        sharded=use_sharded_checkpoint(plan.config, components, topology.world),
        patience_s=plan.config.launch.timeout_s,
        generation=topology.generation,
        every_s=plan.checkpoint_every_s,
        identity={"recipe": mask_nested_secrets(dict(plan.config.recipe)), "seed": plan.config.seed},
        faults=faults,
    )


def use_sharded_checkpoint(config: RunConfig, components: TrainComponents, world: int) -> bool:
    """Return whether each rank writes its own shard: as configured, else if gathering on rank 0 would be costly."""
    if config.checkpoint.sharded != "auto":
        return bool(config.checkpoint.sharded)
    size_bytes = sum(tensor.nbytes for tensor in components.meta_state_dict.values())
    return world > 1 and components.replica.sharded and size_bytes > LARGE_MODEL_BYTES


def make_recorder(
    plan: TrainingPlan,
    journal: MetricsLogger | NullRecorder,
    topology: Topology,
    checkpoint_manager: CheckpointManager,
    restart: RestartCost,
) -> MetricsRecorder | NullRecorder:
    if isinstance(journal, NullRecorder):
        return NullRecorder()
    return MetricsRecorder(
        journal, topology, plan.config.log.every, plan.sizes.tokens_per_sample, checkpoint_manager.rows_written, restart
    )


def make_context(
    topology: Topology,
    plan: TrainingPlan,
    components: TrainComponents,
    checkpoint_manager: CheckpointManager,
    recorder: MetricsRecorder | NullRecorder,
    stop_requests: StopRequests,
    faults: FaultInjector,
    heart: Watchdog | NullWatchdog,
    state: TrainState,
    threads: int,
    goodput: GoodputPolicy | NullGoodputPolicy,
) -> TrainContext:
    settings = plan.config
    components.clock.on_mark(heart.enter_wait)
    loader = components.make_loader(plan, topology, state.position)
    return TrainContext(
        training_plan=plan,
        topology=topology,
        recipe=with_loss_check(components.recipe, checkpoint_manager.journal, state),
        replica=components.replica,
        precision=components.precision,
        loader=loader,
        validator=components.make_validator(plan, topology),
        stats_gather=StatsAllGather(topology.world, settings.launch.timeout_s),
        clock=components.clock,
        recorder=recorder,
        meter=ResourceMeter(components.device, threads, before_s=state.seconds, loading=loader.loading.measure_share),
        checkpoint_manager=checkpoint_manager,
        stop_requests=stop_requests,
        balance=make_load_balancer(plan),
        goodput=goodput,
        faults=faults,
        watchdog=heart,
    )


def with_loss_check(recipe: Any, journal: MetricsLogger | NullRecorder, state: TrainState) -> Any:
    """Wrap the recipe to check its first loss, on rank 0 at the start of training only."""
    if isinstance(journal, NullRecorder) or state.position.samples:
        return recipe
    return RecipeWithLossCheck(recipe, lambda why: journal.log_event("alarm", kind="loss", detail=why))


def make_load_balancer(plan: TrainingPlan) -> LoadBalancer | NullBalancer:
    """The load balancer, if elastic.balance is set and there are several workers."""
    if not plan.config.elastic.balance or plan.world == 1:
        return NullBalancer()
    return LoadBalancer(plan.plan, lambda speeds: make_training_plan(plan.config, plan.sizes, plan.world, speeds).plan)


def make_goodput_policy(
    job_spec: JobSpec, ready: RankSetup, topology: Topology
) -> tuple[GoodputPolicy | NullGoodputPolicy, RunConfig]:
    """Under batch=goodput, the choice at the checkpoint's noise scale, and the configuration with it applied.

    Raises:
        UsageError: the world size is beyond the measured range, or the bounds leave no batch.
    """
    if job_spec.profile is None:
        return NullGoodputPolicy(), job_spec.config
    chooser = BatchChooser(TimingProfile.from_facts(job_spec.profile), job_spec.config, ready.sizes.train)
    noise = {} if ready.found is None else ready.found.manifest.facts["standing"]["noise"]
    known = chooser.combine_noise(noise.get("acted"), noise.get("least"))
    goodput = GoodputPolicy(chooser, topology.world, topology.nodes, known)
    return goodput, goodput.config


def replan(context: TrainContext, state: TrainState) -> tuple[TrainContext, TrainState]:
    """Switch to another plan; all ranks compute the same one, as it depends only on gathered statistics.

    Either another batch now has the highest goodput, and the learning rate follows as in any resize; or the shares are
    adapted to the measured speeds.
    """
    goodput, config, why = (
        context.goodput,
        context.training_plan.config,
        "shares follow the measured speeds of the workers",
    )
    if goodput.successor is not None:
        goodput = goodput.successor
        config, why = goodput.config, goodput.why
    plan = make_training_plan(
        config, context.training_plan.sizes, context.training_plan.world, context.balance.new_speeds
    )
    samples, before = state.position.samples, state.schedule
    after = replace(state, schedule=plan.with_lr_history(before.to_facts(), samples).schedule)
    old, new = (
        plan_to_dict(one, schedule, one.plan_at(samples))
        for one, schedule in ((context.training_plan, before), (plan, after.schedule))
    )
    moments = {} if new["global"] == old["global"] else {"moments": state.second_moment_factor(new["global"])}
    context.checkpoint_manager.journal.log_event("plan", why=why, **new, **{"from": old}, **moments)
    return replace(context, training_plan=plan, goodput=goodput), after


def continue_with_plan(context: TrainContext, components: TrainComponents, state: TrainState) -> TrainContext:
    """Continue under the new plan, with a new loader that starts at the current position."""
    loader = components.make_loader(context.training_plan, context.topology, state.position)
    return replace(
        context,
        loader=loader,
        meter=ResourceMeter(
            context.meter.device, context.meter.threads, context.meter.seconds(), loader.loading.measure_share
        ),
        balance=make_load_balancer(context.training_plan),
    )


def log_start_events(
    context: TrainContext,
    components: TrainComponents,
    job_spec: JobSpec,
    ready: RankSetup,
    state: TrainState,
    backend: str,
    threads: int,
    restart: RestartCost,
) -> None:
    """Log the start events: start, the current plan, and resume or resize if they apply."""
    if context.topology.rank != 0:
        return
    event = context.checkpoint_manager.journal.log_event
    facts = plan_to_dict(context.training_plan, state.schedule, context.training_plan.plan_at(state.position.samples))
    last = job_spec.run_dir.read_plan()  # read before the plan event, which overwrites it
    start = make_start_facts(context, components, state)
    event("start", run_dir=str(job_spec.run_dir.path), backend=backend, threads=threads, **start)
    event("plan", why="; ".join(filter(None, (context.goodput.why, job_spec.why))), **facts, **{"from": None})
    if ready.found is not None:
        event("resume", **make_resume_facts(ready.found, state), changed=job_spec.changed, lost_samples=restart.lost)
        for detail in checkpoint_warnings(ready.found, state):
            event("alarm", kind="checkpoint", detail=detail)
    before = previous_plan(ready.found, last)
    if before and any(before[name] != facts[name] for name in ("world", "global", "lr_scale")):
        moments = state.second_moment_factor(facts["global"])
        why = "; ".join(filter(None, (resize_reason(before, facts), context.goodput.why)))
        event("resize", why=why, **{"from": before, "to": facts}, moments=moments)


def make_start_facts(context: TrainContext, components: TrainComponents, state: TrainState) -> dict[str, Any]:
    """The fields of the start event."""
    plan, settings, position = context.training_plan, context.training_plan.config, state.position
    device = context.precision.device
    return {
        "recipe": type(components.recipe).__name__,
        "data": {"train": plan.sizes.train, "val": plan.sizes.val},
        "parameters": components.parameters,
        "trainable": components.trainable,
        "strategy": settings.strategy.name,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "precision": settings.train.precision,
        "world": context.topology.world,
        "nodes": context.topology.nodes,
        "seed": settings.seed,
        "duration_samples": plan.duration,
        "updates": position.update + plan.timeline.count_updates(position),
        "updates_per_epoch": plan.sizes.train / plan.plan.global_batch,
        "generation": context.topology.generation,
        "optimizer": type(context.replica.optimizer).__name__,
        "decay": settings.schedule.decay,
    }


def make_resume_facts(found: VerifiedCheckpoint, state: TrainState) -> dict[str, Any]:
    """The fields of the resume event."""
    return {
        "checkpoint": found.path.name,
        "samples": state.position.samples,
        "update": state.position.update,
        "passed_over": [{"name": name, "why": why} for name, why in found.skipped],
    }


def checkpoint_warnings(found: VerifiedCheckpoint, state: TrainState) -> Iterator[str]:
    """Yield warnings about checkpoints that are missing or were skipped."""
    lost = found.manifest.facts["standing"]["best_checkpoint"]
    if lost != state.best_checkpoint:
        yield f"the best checkpoint so far, {lost}, is missing from this run's directory"
    for name, why in found.skipped:
        yield f"{name} was passed over: {why}"


def previous_plan(found: VerifiedCheckpoint | None, last: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The plan before this start: the checkpoint's, or the last logged one if the world size has changed since."""
    if found is None or (last is not None and last["world"] != found.manifest.plan["world"]):
        return last
    return dict(found.manifest.plan)


def resize_reason(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if before["world"] != after["world"]:
        return f"{before['world']} workers before, {after['world']} now"
    return "the plan changed at the same number of workers"


def finish_run(
    context: TrainContext, job_spec: JobSpec, found: VerifiedCheckpoint | None, state: TrainState, ending: int
) -> None:
    """On rank 0, write the final parameters and done.json, or log that training was stopped."""
    position, event = state.position, context.checkpoint_manager.journal.log_event
    if ending != GO_ON:
        why = job_spec.run_dir.read_stop_reason() or context.stop_requests.reason or "another rank"
        event("preempt", why=why, samples=position.samples, update=position.update)
        return
    run_dir = job_spec.run_dir
    checkpoints = run_dir.resolve_checkpoints_dir(context.training_plan.config.checkpoint.dir)
    last = checkpoints / checkpoint_name(
        state
    )  # absent if training had already ended at a checkpoint that the user named
    ended = found if found is not None and not last.is_dir() else open_checkpoint(last)
    tensor_io.export_safetensors(run_dir.model, tensor_io.load_checkpoint(ended).model)
    if state.best_checkpoint is not None:
        best = open_checkpoint(checkpoints / state.best_checkpoint)
        tensor_io.export_safetensors(run_dir.path / "best.safetensors", tensor_io.load_checkpoint(best).model)
    done = {
        "samples": position.samples,
        "updates": position.update,
        "seconds": context.meter.seconds(),
        "metrics": dict(state.metrics),
        "restarts": run_dir.read_restarts(),
        **sum_restart_costs(run_dir.metrics),
    }
    if state.target_reached is not None:
        done["target"] = dict(state.target_reached)
    event("done", **done)
    run_dir.write_done(done)


JOIN_TIMEOUT_S = 60.0  # time for a node's torchrun to start and to reach the rendezvous


def admit_waiting_nodes(context: TrainContext, state: TrainState) -> int:
    """Admit the waiting nodes after the save. Return RESTART once a node has joined and the agents end the workers.

    Return ADMIT_NODES if no node joined in time: training continues. A failed save has already raised an alarm and is
    retried when the next checkpoint is due.
    """
    with suppress(OSError):
        context.checkpoint_manager.wait()
    names = (
        ", ".join(context.checkpoint_manager.stop_source.admit_nodes())
        if context.checkpoint_manager.stop_source
        else ""
    )
    end_s = time.monotonic() + JOIN_TIMEOUT_S
    while context.stop_requests.level <= JOIN and time.monotonic() < end_s:
        context.watchdog.enter_phase("checkpoint", state.position.update)
        time.sleep(GATE_POLL_S)
    if context.stop_requests.level == LEAVE:
        return LEAVE
    detail = f"{names} asked to join but did not connect within {JOIN_TIMEOUT_S:g} s"
    context.checkpoint_manager.journal.log_event("alarm", kind="gate", detail=detail)
    context.stop_requests.clear_admit()
    return JOIN
