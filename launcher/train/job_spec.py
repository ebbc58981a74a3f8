"""The job specification that rank 0 or the driver hands to the other ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint.manifest import latest_id
from launcher.config.keys import from_mapping, to_mapping
from launcher.config.schema import RunConfig
from launcher.run_dir.run_directory import RunDirectory

if TYPE_CHECKING:
    from launcher.run_dir.open_run import OpenedRun

__all__ = ["JobSpec"]


@dataclass(frozen=True)
class JobSpec:
    """The job of the ranks: the resolved configuration and the run directory.

    `checkpoint` was given by the user, and `require_checkpoint` requires that one exists; both apply until this job has
    saved a checkpoint of its own, i.e. until the newest one in the directory differs from `previous_checkpoint`.
    `changed` (the keys that differ from the directory's configuration) applies only to the first start, generation
    `first_generation` (None: this one). `restarted`: this job has started its workers before. `under_driver`: the
    driver has started the job, on one machine and with our own store. `summary`: the run is already complete, and only
    this text is printed. `why`: values that were chosen automatically for this command, and the reason. `profile`: the
    timing profile that batch=goodput uses. `unwritten_failures`: the driver's file in memory for failures that cannot
    be written to the run directory.
    """

    config: RunConfig
    run_dir: RunDirectory
    generation: int = 0
    first_generation: int | None = None
    restarted: bool = False
    previous_checkpoint: str | None = None
    under_driver: bool = False
    checkpoint: Path | None = None
    require_checkpoint: bool = False
    changed: Mapping[str, Any] = field(default_factory=dict)
    summary: str | None = None
    why: str = ""
    profile: Mapping[str, Any] | None = None
    unwritten_failures: str | None = None

    @classmethod
    def from_opened(
        cls, opened: OpenedRun, *, under_driver: bool, why: str = "", profile: Mapping[str, Any] | None = None
    ) -> JobSpec:
        decision = opened.decision
        return cls(
            config=opened.config,
            run_dir=opened.run_dir,
            under_driver=under_driver,
            why=why,
            profile=profile,
            previous_checkpoint=latest_id(opened.run_dir.resolve_checkpoints_dir(opened.config.checkpoint.dir)),
            checkpoint=decision.checkpoint,
            require_checkpoint=decision.require_checkpoint,
            changed={key: list(values) for key, values in decision.changed.items()},
        )

    def to_json(self) -> str:
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        paths = {"run_dir": str(self.run_dir.path), "checkpoint": checkpoint}
        return json.dumps({**vars(self), "config": to_mapping(self.config), **paths})

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        facts = json.loads(text)
        checkpoint = facts["checkpoint"] and Path(facts["checkpoint"])
        paths = {"run_dir": RunDirectory(Path(facts["run_dir"])), "checkpoint": checkpoint}
        return cls(**{**facts, "config": from_mapping(facts["config"]), **paths})

    def start_generation(self) -> JobSpec:
        """The job for another start of the workers; once this job has saved, it always continues from there."""
        generation = self.run_dir.increment_generation()
        if not self.restarted and generation == (self.first_generation or generation):
            return replace(self, generation=generation)
        self.run_dir.increment_restarts()
        restarted_job = replace(self, generation=generation, restarted=True, changed={}, why="")
        saved = latest_id(self.run_dir.resolve_checkpoints_dir(self.config.checkpoint.dir)) != self.previous_checkpoint
        return replace(restarted_job, checkpoint=None, require_checkpoint=False) if saved else restarted_job
