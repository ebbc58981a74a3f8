"""What the training loop works with: `TrainContext`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema import RunConfig
from launcher.distributed.load_balancing import LoadBalancer
from launcher.distributed.stop_requests import StopRequests
from launcher.distributed.watchdog import Watchdog
from launcher.goodput.policy import GoodputPolicy
from launcher.plan.timeline import Update
from launcher.plan.training_plan import TrainingPlan
from launcher.run_dir.run_directory import RunDirectory
from launcher.strategies.interface import Replica
from launcher.strategies.precision import Precision
from launcher.system.fault_injection import FaultInjector
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.telemetry.resource_meter import ResourceMeter
from launcher.telemetry.stage_clock import StageClock
from launcher.topology import Topology
from launcher.train.checkpoint_manager import CheckpointManager
from launcher.train.data import MicroBatchLoader
from launcher.train.metrics_recorder import MetricsRecorder
from launcher.train.validation import Validator

__all__ = ["TrainContext"]


@dataclass(frozen=True)
class TrainContext:
    """Everything the training loop uses; made by `launcher.train.context_setup`.

    `logger` and `recorder` are None on ranks above 0. `validator` is None without validation data, `load_balancer`
    without elastic.balance, `goodput` without batch=goodput, `watchdog` on a node without a usable temp directory.
    `reads_late`: the host reads the ranks' statistics one update late, since it would have to wait for the device.
    """

    training_plan: TrainingPlan
    topology: Topology
    run_dir: RunDirectory
    recipe: Any
    replica: Replica
    precision: Precision
    loader: MicroBatchLoader
    validator: Validator | None
    clock: StageClock
    meter: ResourceMeter
    logger: MetricsLogger | None
    recorder: MetricsRecorder | None
    checkpoint_manager: CheckpointManager
    stop_requests: StopRequests
    faults: FaultInjector
    load_balancer: LoadBalancer | None = None
    goodput: GoodputPolicy | None = None
    watchdog: Watchdog | None = None
    reads_late: bool = False

    @property
    def config(self) -> RunConfig:
        return self.training_plan.config

    @property
    def stop_source(self) -> RunDirectory | None:
        """Where to look for stop and join requests: the run directory, on rank 0 only."""
        return self.run_dir if self.topology.rank == 0 else None

    def enter_phase(self, phase: str, update: Update) -> None:
        """Enter a phase: publish it to the watchdog, and inject a fault if one is configured."""
        if self.watchdog is not None:
            self.watchdog.enter_phase(phase, update.index + 1)
        if self.faults.active:
            self.faults.inject_at(phase, update.index + 1)

    def log_event(self, name: str, /, **facts: Any) -> None:
        """Log an event, on rank 0 only."""
        if self.logger is not None:
            self.logger.log_event(name, **facts)
