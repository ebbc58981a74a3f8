"""Fault injection for the project's own tests.

`FAULT=kind@phase:rank:update[:generation]` takes effect only if `LAUNCHER_TEST_FAULTS=1` is set as well. Several
faults are separated by commas. Kinds: kill, stop, hang, exit, exception, oom, nan, slow, enospc. Updates count from
1; 0 matches any update. Generation 0 matches any generation; the default is 1.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Fault", "FaultInjector"]

FAULT_PHASES = (
    "start", "rendezvous", "restore", "data", "forward", "backward", "sync", "optimizer", "checkpoint-write",
    "checkpoint-rename", "validate", "finish",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    kind: str
    phase: str
    rank: int
    update: int
    generation: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.phase}:{self.rank}:{self.update}:{self.generation}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, _, trigger = text.partition("@")
        phase, rank, update, *generation = trigger.split(":")
        if phase not in FAULT_PHASES:
            raise ValueError(f"FAULT={text}: {phase} is not a phase, choose from {', '.join(FAULT_PHASES)}")
        return cls(kind, phase, int(rank), int(update), int(generation[0]) if generation else 1)


@dataclass(frozen=True)
class FaultInjector:
    """The faults of one rank in one generation; call it at each phase to inject those that match.

    `reads_late` (READ_STATS_LATE=1): on a CPU too, the host reads the ranks' statistics one update late, as on a GPU.
    """

    active: tuple[Fault, ...] = ()
    reads_late: bool = False

    @classmethod
    def from_env(cls, rank: int, generation: int, env: Mapping[str, str] = os.environ) -> FaultInjector:
        if env.get("LAUNCHER_TEST_FAULTS") != "1":
            return cls()
        faults = map(Fault.parse, env["FAULT"].split(",") if "FAULT" in env else ())
        active = tuple(f for f in faults if f.rank == rank and f.generation in (0, generation))
        return cls(active, reads_late=env.get("READ_STATS_LATE") == "1")

    def inject_at(self, phase: str, update: int = 0) -> None:
        for fault in self.active:
            if fault.phase == phase and fault.update in (0, update):
                inject(fault)

    def injects_nan(self, phase: str, update: int) -> bool:
        """Whether a value of this phase should become NaN."""
        return any(f.kind == "nan" and f.phase == phase and f.update in (0, update) for f in self.active)


def inject(fault: Fault) -> None:
    logging.getLogger(__name__).warning("injected fault: %s", fault)  # tests look for this log line
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif fault.kind == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "exit":
        os._exit(3)
    elif fault.kind == "exception":
        raise RuntimeError(f"injected fault in {fault.phase}")
    elif fault.kind == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory: injected fault")
    elif fault.kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.kind == "slow":
        time.sleep(0.05)
