"""What a user's own torchrun agent must remember across restarts of its workers."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from launcher.run_dir.run_directory import RUNS_DIR
from launcher.system.atomic_files import atomic_write_text, make_durable_dir
from launcher.system.processes import read_start_time

__all__ = ["AGENT_MEMORY_DIR", "AgentMemory", "get_agent_memory_path", "load_agent_memory", "save_agent_memory"]


AGENT_MEMORY_DIR = RUNS_DIR / ".agents"


@dataclass(frozen=True)
class AgentMemory:
    """The run directory chosen at the first start under an agent, and the newest checkpoint at that time."""

    folder: Path
    newest: str | None = None

    def to_json(self) -> str:
        return json.dumps({"folder": str(self.folder), "newest": self.newest})

    @classmethod
    def from_json(cls, text: str) -> AgentMemory:
        facts = json.loads(text)
        return cls(Path(facts["folder"]), facts["newest"])


def load_agent_memory() -> AgentMemory | None:
    """Load what an earlier worker of the same agent decided; None at the agent's first start of its workers."""
    try:
        return AgentMemory.from_json(get_agent_memory_path().read_text())
    except FileNotFoundError:
        return None


def save_agent_memory(memory: AgentMemory) -> None:
    """Save the decision, keyed by host, agent pid and agent start time; remove the files of dead agents."""
    make_durable_dir(AGENT_MEMORY_DIR)
    for old in AGENT_MEMORY_DIR.iterdir():
        host, _, agent = old.name.rpartition("@")
        pid, _, start = agent.partition("-")
        if host == socket.gethostname() and pid.isdigit() and str(read_start_time(int(pid))) != start:
            old.unlink(missing_ok=True)
    atomic_write_text(get_agent_memory_path(), memory.to_json())


def get_agent_memory_path() -> Path:
    agent = os.getppid()
    return AGENT_MEMORY_DIR / f"{socket.gethostname()}@{agent}-{read_start_time(agent)}"
