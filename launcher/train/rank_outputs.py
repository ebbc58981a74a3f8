"""What one rank writes to the run directory: events and rows on rank 0, checkpoints on every rank."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from launcher.config.keys import flatten
from launcher.config.schema import RunConfig
from launcher.plan.training_plan import TrainingPlan
from launcher.run_dir import failures
from launcher.run_dir.restart_cost import RestartCost, read_last_row
from launcher.strategies.interface import LARGE_MODEL_BYTES
from launcher.system.fault_injection import FaultInjector
from launcher.system.redaction import mask_nested_secrets
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.telemetry.sinks import SinkContext, open_sinks
from launcher.telemetry.wandb_env import get_wandb_run_id
from launcher.topology import Topology
from launcher.train.build import TrainComponents
from launcher.train.checkpoint_manager import CheckpointManager, CheckpointOptions
from launcher.train.job_spec import JobSpec
from launcher.train.metrics_recorder import MetricsRecorder
from launcher.train.rank_setup import RankJob
from launcher.train.state import TrainState

__all__ = ["RankOutputs", "compute_restart_cost", "log_failure", "make_checkpoint_manager"]


@dataclass(frozen=True)
class RankOutputs:
    """The logger and the recorder of rank 0 (None on other ranks), and the checkpoint manager of every rank."""

    logger: MetricsLogger | None
    recorder: MetricsRecorder | None
    checkpoint_manager: CheckpointManager
    restart_cost: RestartCost

    @classmethod
    def open(cls, job: RankJob, plan: TrainingPlan, components: TrainComponents, state: TrainState) -> RankOutputs:
        """Open the sinks on rank 0; the first row of a restarted job states the cost of the restart."""
        topology, is_rank0 = job.topology, job.topology.rank == 0
        restart_cost = compute_restart_cost(job.spec, state) if is_rank0 else RestartCost()
        logger = open_metrics_logger(job.spec) if is_rank0 else None
        checkpoint_manager = make_checkpoint_manager(job.spec, plan, components, logger, topology, job.faults)
        recorder = None
        if logger is not None:
            every, tokens_per_sample = plan.config.log.every, plan.sizes.tokens_per_sample
            on_saved_row = checkpoint_manager.rows_written

            def record_trained() -> None:
                with suppress(OSError):  # e.g. disk full: the driver then counts this start as one without an update
                    job.spec.run_dir.record_trained_generation(topology.generation)

            recorder = MetricsRecorder(
                logger, topology, every, tokens_per_sample, on_saved_row, restart_cost, record_trained
            )
        return cls(logger, recorder, checkpoint_manager, restart_cost)

    def record_failure(self, error: BaseException, job: RankJob) -> None:
        """Write the row of the interrupted update and log the error."""
        if self.recorder is not None:
            self.recorder.flush_unfinished()
        if self.logger is not None:
            log_failure(error, job.spec, self.logger, job.topology)

    def close(self) -> None:
        """Wait for the current save to end, and write the remaining rows and events."""
        self.checkpoint_manager.close()
        if self.logger is not None:
            self.logger.close()


def log_failure(error: BaseException, job_spec: JobSpec, logger: MetricsLogger, topology: Topology) -> None:
    """Log an error; if another rank died, log only an alarm: that rank reports the cause."""
    log = job_spec.run_dir.get_log_path(*topology.rank_and_generation)
    failure = failures.RankFailure.from_exception(*topology.rank_and_generation, error, log)
    if failures.is_peer_failure(failure.message):
        logger.log_event("alarm", kind="peer", detail="lost connection to another worker", message=failure.message)
    else:
        logger.log_event("error", **failure.to_event().fields)


def open_metrics_logger(job_spec: JobSpec) -> MetricsLogger:
    """Open the configured sinks and the run's JSONL files."""
    run_dir = job_spec.run_dir
    sink_context = SinkContext(
        folder=run_dir.path,
        name=str(job_spec.config.run.name),
        wandb_id=run_dir.ensure_wandb_id(get_wandb_run_id()),
        config=dict(mask_nested_secrets(flatten(job_spec.config))),
    )
    return MetricsLogger(open_sinks(job_spec.config.sink, sink_context))


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
    logger: MetricsLogger | None,
    topology: Topology,
    faults: FaultInjector,
) -> CheckpointManager:
    """Make the checkpoint manager of this rank; its events go to `logger`, None on ranks above 0."""
    config = plan.config
    options = CheckpointOptions(
        config.checkpoint,
        sharded=use_sharded_checkpoint(config, components, topology.world),
        every_s=plan.checkpoint_every_s,
        shard_timeout_s=config.launch.timeout_s,
        identity={
            "recipe": mask_nested_secrets(dict(config.recipe)),
            "seed": config.seed,
            "data": {"train": plan.sizes.train, "val": plan.sizes.val},
        },
    )
    return CheckpointManager(job_spec.run_dir, options, topology, logger, faults)


def use_sharded_checkpoint(config: RunConfig, components: TrainComponents, world: int) -> bool:
    """Return whether each rank writes its own shard: as configured, else if gathering on rank 0 would be costly."""
    if config.checkpoint.sharded != "auto":
        return bool(config.checkpoint.sharded)
    size_bytes = sum(tensor.nbytes for tensor in components.meta_state_dict.values())
    return world > 1 and components.replica.sharded and size_bytes > LARGE_MODEL_BYTES
