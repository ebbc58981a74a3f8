"""The run name that torchrun agents keep across worker restarts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.launch import agent_memory
from launcher.launch.agent_memory import AgentMemory, load_agent_memory, save_agent_memory
from launcher.system.processes import read_start_time


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_agent_memory_survives_worker_restarts(work_dir: Path) -> None:
    assert load_agent_memory() is None
    save_agent_memory(AgentMemory(Path("runs/resnet-1"), "update-7 12"))
    assert load_agent_memory() == AgentMemory(Path("runs/resnet-1"), "update-7 12")
    (file,) = Path("runs/.agents").iterdir()
    assert file.name == f"{socket.gethostname()}@{os.getppid()}-{read_start_time(os.getppid())}"


def test_agent_with_reused_pid_has_no_memory(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_agent_memory(AgentMemory(Path("runs/resnet-1"), "update-7 12"))
    monkeypatch.setattr(agent_memory, "read_start_time", lambda pid: 12345)
    assert load_agent_memory() is None


def test_memory_of_dead_agents_is_removed(work_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    agents = Path("runs/.agents")
    agents.mkdir(parents=True)
    others = {f"node-1@{dead.pid}-77", "node-1-2@5-6", "notes", "node@mine"}
    for name in (*others, f"node@{dead.pid}-77"):
        (agents / name).write_text("runs/x")
    save_agent_memory(AgentMemory(Path("runs/resnet-1"), "update-7 12"))
    mine = f"node@{os.getppid()}-{read_start_time(os.getppid())}"
    assert {path.name for path in agents.iterdir()} == {*others, mine}
