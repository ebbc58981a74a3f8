"""What rank 0 decides before training, and the form in which the other ranks receive it through the store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.config.keys import from_mapping, to_mapping
from launcher.config.schema import RunConfig
from launcher.run_dir.lock import RunDirLock
from launcher.train.job_spec import JobSpec

__all__ = ["Decision", "MeasurementRequest", "RunDirClaim"]


@dataclass(frozen=True)
class RunDirClaim:
    """Rank 0's claim on the run directory: the lock, unless the driver holds it, and the topmost created directory."""

    job_spec: JobSpec
    lock: RunDirLock | None = None
    created_dir: Path | None = None

    def discard(self) -> None:
        """Remove the directories that were created, because the configuration is invalid."""
        if self.created_dir is not None:
            self.job_spec.run_dir.discard(self.created_dir)

    def release(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.release()


@dataclass(frozen=True)
class MeasurementRequest:
    """A measurement by all ranks that rank 0 needs before it can open the run. `token` is unique."""

    config: RunConfig
    token: str

    def to_json(self) -> str:
        return json.dumps({"config": to_mapping(self.config), "token": self.token})

    @classmethod
    def from_json(cls, text: str) -> MeasurementRequest:
        facts = json.loads(text)
        return cls(from_mapping(facts["config"]), facts["token"])


@dataclass(frozen=True)
class Decision:
    """Rank 0's decision as every rank receives it: the job, or a measurement that comes first.

    Neither is set if rank 0 has failed: it reports the error, and the other ranks exit.
    """

    job_spec: JobSpec | None = None
    measurement: MeasurementRequest | None = None

    @classmethod
    def from_rank0(cls, choice: RunDirClaim | MeasurementRequest) -> Decision:
        """The part of rank 0's choice that concerns all ranks."""
        if isinstance(choice, MeasurementRequest):
            return cls(measurement=choice)
        return cls(job_spec=choice.job_spec)

    def to_json(self) -> str:
        job_spec = None if self.job_spec is None else self.job_spec.to_json()
        measurement = None if self.measurement is None else self.measurement.to_json()
        return json.dumps({"job_spec": job_spec, "measurement": measurement})

    @classmethod
    def from_json(cls, text: str) -> Decision:
        facts = json.loads(text)
        job_spec, measurement = facts["job_spec"], facts["measurement"]
        return cls(
            job_spec=None if job_spec is None else JobSpec.from_json(job_spec),
            measurement=None if measurement is None else MeasurementRequest.from_json(measurement),
        )
