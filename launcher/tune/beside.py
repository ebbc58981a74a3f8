"""Measuring under a torchrun of the user's own: each worker has a process beside it do so, and waits.

What measuring does to a process (memory, libraries' state, process groups) ends with that process, and one that runs
out of memory while others wait for it ends nobody's job. The processes meet through a part of the job's store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import failure
from launcher.errors import EXIT_AGAIN, EXIT_OK, RequestError
from launcher.topology import AS_GUEST, Topology
from launcher.tune.auto import Unmeasured
from launcher.tune.council import Council
from launcher.tune.drive import RESULT, STATE, after_loss, why

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["measured"]

LOOK_EVERY_S = 0.05
MOST_ROUNDS = 20


@dataclass(frozen=True)
class Round:
    """One start of the processes. `name` is its part of the store, `earlier` what rounds before found out."""

    name: str
    store: dist.Store
    rank: int
    private: Path

    def ended(self, run: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        """This rank's process from start to end: its status, and what it left behind."""
        handover = self.private / "handover.json"
        facts = {"run": run, "private": str(self.private), "look": True, "prefix": self.name, "earlier": earlier}
        handover.touch(0o600)
        handover.write_text(json.dumps(facts))
        argv = [sys.executable, "-m", "launcher", "probe", str(handover)]
        process = subprocess.Popen(argv, env={**os.environ, **AS_GUEST}, stdout=2)
        try:
            status = self._waited(process)
        finally:
            process.kill()
            process.wait()
        first = failure.first(self.private, 0)
        return {
            "status": status,
            "request": isinstance(first and why(first), RequestError),
            "why": None if first is None else str(why(first)),
            "result": self._read(RESULT) if status == EXIT_OK else None,
            "state": self._read(STATE) if status == EXIT_AGAIN or status is None else None,
        }

    def _waited(self, process: subprocess.Popen[bytes]) -> int | None:
        """Its exit status; None where another rank's has failed, and it is not to be waited for."""
        while process.poll() is None:
            if self.store.check([f"{self.name}/failed"]):
                return None
            time.sleep(LOOK_EVERY_S)
        if process.returncode != EXIT_OK:
            self.store.set(f"{self.name}/failed", str(self.rank))
        return process.returncode

    def _read(self, name: str) -> Any:
        file = self.private / name
        return json.loads(file.read_text()) if file.exists() else None


def measured(question: Mapping[str, Any], topology: Topology, store: dist.Store) -> dict[str, Any]:
    """The document that the ranks' processes come to, the same on all. Every rank calls it.

    Raises:
        RequestError: the request is wrong, found by any rank.
        Unmeasured: a process failed for another reason than memory.
    """
    council, earlier = Council(store, topology.rank, topology.world), None
    for number in range(MOST_ROUNDS):
        with tempfile.TemporaryDirectory(prefix="launcher-auto-") as private:
            beside = Round(f"{question['token']}/{number}", store, topology.rank, Path(private))
            words = council.gather(beside.ended(question["question"], earlier))
        statuses = [word["status"] for word in words]
        if all(status == EXIT_OK for status in statuses):
            found: dict[str, Any] = words[0]["result"]
            return found
        _raise_first(words)
        if EXIT_AGAIN not in statuses or (words[0]["state"] or {}).get("trying") is None:
            raise Unmeasured(f"measuring batch sizes failed: the ranks' processes ended with {statuses}")
        earlier = after_loss(words[0]["state"])
    raise Unmeasured(f"measuring batch sizes ran out of memory {MOST_ROUNDS} times: type tune.max= or a number")


def _raise_first(words: list[dict[str, Any]]) -> None:
    """
    Raises:
        RequestError, Unmeasured: what the first rank that has something to say died of.
    """
    first = next((word for word in words if word["why"] is not None), None)
    if first is not None:
        raise RequestError(first["why"]) if first["request"] else Unmeasured(first["why"])
