"""What one rank prepares before training: its setup before it joins the others, and the restored state after that."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from launcher import recipe as recipes
from launcher.checkpoint import tensor_io
from launcher.checkpoint.manifest import VerifiedCheckpoint, latest_valid, open_checkpoint
from launcher.checkpoint.model_layout import check_tensor_names
from launcher.distributed.stop_requests import StopRequests
from launcher.distributed.watchdog import Watchdog
from launcher.errors import UsageError
from launcher.plan.timeline import Position
from launcher.plan.training_plan import DatasetSizes, TrainingPlan
from launcher.run_dir.resume import check_data_length
from launcher.system.fault_injection import FaultInjector
from launcher.topology import Topology
from launcher.train.build import Datasets, TrainComponents, open_datasets, resolve_device
from launcher.train.job_spec import JobSpec
from launcher.train.seeding import DATASET_STREAM, derive_seed, seed_host_generators
from launcher.train.state import TrainState

__all__ = ["RankJob", "RankSetup", "find_checkpoint", "prepare_rank", "restore_state"]


@dataclass(frozen=True)
class RankSetup:
    """What a rank prepares before it joins the others, so that its errors do not leave them waiting."""

    recipe: Any
    sizes: DatasetSizes
    device: torch.device
    datasets: Datasets
    checkpoint: VerifiedCheckpoint | None
    run_dir_generation: int

    def collect_facts(self) -> Mapping[str, Any]:
        """The values that must be equal on all ranks."""
        return {
            "the launcher's version": version("elastic-batch-launcher"),
            "torch's version": torch.__version__,
            "python's version": platform.python_version(),
            "the training data's length": self.sizes.train,
            "the validation data's length": self.sizes.val,
            "the generation in the run directory": self.run_dir_generation,
            "the newest checkpoint": None if self.checkpoint is None else self.checkpoint.path.name,
        }


@dataclass(frozen=True)
class RankJob:
    """One rank's job: what stays the same from the start of the workers to their end."""

    spec: JobSpec
    topology: Topology
    setup: RankSetup
    stop_requests: StopRequests
    watchdog: Watchdog | None
    faults: FaultInjector
    threads: int

    def handle_sigterm(self) -> None:
        """From now on, SIGTERM and SIGHUP save before they end this rank."""
        is_busy = (lambda: False) if self.watchdog is None else self.watchdog.node_is_busy
        self.stop_requests.handle_sigterm(self.spec.config.launch.grace_s, is_busy)

    def enter_phase(self, phase: str) -> None:
        """Enter a phase outside of the training loop: publish it, and inject a fault if one is configured."""
        if self.watchdog is not None:
            self.watchdog.enter_phase(phase)
        self.faults.inject_at(phase)


def prepare_rank(job_spec: JobSpec, topology: Topology) -> RankSetup:
    """Build the recipe, open its data and find the checkpoint to resume from.

    Raises:
        UsageError: the recipe, its data, the device or the checkpoint do not allow the run.
    """
    config = job_spec.config
    seed_host_generators(derive_seed(config.seed, DATASET_STREAM))  # a data set drawn without a seed of its own
    recipe = recipes.build_recipe(config.recipe)
    opened: dict[str, Any] = {}
    sizes = recipes.get_dataset_sizes(recipe, opened)
    checkpoint = find_checkpoint(job_spec)
    if checkpoint is not None:
        check_data_length(checkpoint.path, checkpoint.manifest, sizes.train)
    return RankSetup(
        recipe=recipe,
        sizes=sizes,
        device=resolve_device(config, topology),
        datasets=open_datasets(recipe, config, sizes, opened),
        checkpoint=checkpoint,
        run_dir_generation=job_spec.run_dir.read_generation(),
    )


def find_checkpoint(job_spec: JobSpec) -> VerifiedCheckpoint | None:
    """The checkpoint to resume from: at the first start of the job the one the user named, else the newest in the run.

    Raises:
        UsageError: all checkpoints are corrupt, or there is none and `resume=must`.
    """
    if job_spec.checkpoint is not None:
        return open_checkpoint(job_spec.checkpoint)
    checkpoint = latest_valid(job_spec.run_dir.resolve_checkpoints_dir(job_spec.config.checkpoint.dir))
    if checkpoint is None and job_spec.require_checkpoint:
        raise UsageError(f"resume=must: {job_spec.run_dir.path} contains no checkpoint: type resume=auto")
    return checkpoint


def restore_state(
    components: TrainComponents, plan: TrainingPlan, checkpoint: VerifiedCheckpoint | None, checkpoints_dir: Path
) -> TrainState:
    """Restore the training state from the checkpoint, or create the initial one.

    The best checkpoint so far is kept only if it still exists in `checkpoints_dir`.
    """
    if checkpoint is None:
        return TrainState.initial(plan)
    check_tensor_names(checkpoint.manifest, components.meta_state_dict)
    loaded = tensor_io.load_checkpoint(checkpoint)
    facts = loaded.manifest.facts
    components.replica.restore(loaded.model, loaded.optimizer, facts)
    state = TrainState.from_state_dict(plan, Position(**loaded.manifest.position), facts["standing"])
    if state.best_checkpoint is not None and not (checkpoints_dir / state.best_checkpoint).is_dir():
        return replace(state, best=None, best_checkpoint=None)
    return state
