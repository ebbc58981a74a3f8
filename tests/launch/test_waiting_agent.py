"""The agent that starts while the driver composes: it runs the job's command, or leaves nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import train
from launcher.config.schema import BatchConfig, LaunchConfig, RunConfig
from launcher.distributed.commands import AGENT_MODULE, Command
from launcher.errors import UsageError
from launcher.launch.waiting_agent import WaitingAgent, read_command, waiting_agent
from launcher.system.processes import list_child_pids, read_command_line
from tests.helpers.jobs import is_alive, wait_for

BATCH = BatchConfig(per_device=8)
HERE = RunConfig(batch=BATCH)


def list_agents(parent: int | None = None) -> list[int]:
    return [pid for pid in list_child_pids(parent or os.getpid()) if AGENT_MODULE in read_command_line(pid)]


def wait_for_agent(parent: int) -> int:
    wait_for(lambda: list_agents(parent))
    (agent,) = list_agents(parent)
    return agent


@pytest.mark.process
def test_agent_runs_the_command_with_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write = 'echo "$A-$RANK-$WORLD_SIZE" > $RANK'
    torchrun = ("--nproc-per-node=2", "--local-addr=127.0.0.1", "--no-python", "bash", "-c", write)
    with waiting_agent([]) as waiting:
        assert waiting is not None
        agent = waiting.hand_over(Command((sys.executable, "-m", AGENT_MODULE, *torchrun), {"A": "b c"}))
    assert agent is not None
    assert agent.wait(100) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["b c-0-2\n", "b c-1-2\n"]


def test_agent_waits_while_the_driver_composes_and_ends_with_a_wrong_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def compose_wrongly(_: Any) -> RunConfig:
        seen.append(wait_for_agent(os.getpid()))
        raise UsageError("wrong")

    monkeypatch.setattr(train, "resolve_config", compose_wrongly)
    with pytest.raises(UsageError, match="wrong"):
        train.run_train(["recipe=mlp"])
    (agent,) = seen
    assert not is_alive(agent)
    assert list_agents() == []


@pytest.mark.parametrize("override", ["launch=slurm", "launch.kind=slurm", "launch.dry_run=true", "++launch.dry_run=1"])
def test_no_agent_is_started_for_another_start(override: str) -> None:
    with waiting_agent(["recipe=mlp", override]) as waiting:
        assert waiting is None
    assert list_agents() == []


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (HERE, True),
        (replace(HERE, launch=LaunchConfig(kind="slurm")), False),
        (replace(HERE, launch=LaunchConfig(dry_run=True)), False),
        (replace(HERE, launch=LaunchConfig(env={"LD_PRELOAD": "own.so"})), False),
        (replace(HERE, batch=replace(BATCH, per_device="auto")), False),
        (replace(HERE, batch=replace(BATCH, policy="goodput")), False),
    ],
)
def test_agent_is_kept_where_the_configuration_trains_here(config: RunConfig, needed: bool) -> None:
    with waiting_agent([]) as waiting:
        assert waiting is not None
        agent = wait_for_agent(os.getpid())
        waiting.discard_unless_needed(config)
        assert is_alive(agent) is needed
        assert needed or waiting.hand_over(Command((AGENT_MODULE,), {})) is None
    assert not is_alive(agent)


def test_driver_starts_another_agent_where_the_waiting_one_was_killed() -> None:
    waiting = WaitingAgent()
    agent = wait_for_agent(os.getpid())
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not is_alive(agent))
    assert waiting.hand_over(Command((AGENT_MODULE,), {})) is None
    waiting.discard()


def test_agent_ends_with_a_driver_that_is_killed() -> None:
    code = "from launcher.launch.waiting_agent import WaitingAgent; import time; agent = WaitingAgent(); time.sleep(60)"
    driver = subprocess.Popen([sys.executable, "-c", code])
    agent = wait_for_agent(driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not is_alive(agent))


@pytest.mark.parametrize("text", ["", '{"argv": ["--nnod', '{"argv": [], "env": {}, "unset": []}'])
def test_agent_that_gets_no_whole_command_has_nothing_to_do(text: str) -> None:
    """The driver may be killed while it writes."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    assert read_command(reader) is None


def test_command_is_read_although_another_process_keeps_the_pipe_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a recipe's module has forked in the driver has all of the driver's files."""
    reader, writer = os.pipe()
    text = '{"argv": ["--nnodes=1"], "env": {"ADDED": "1"}, "unset": ["REMOVED"]}'
    code = "import os, sys; from launcher.launch.waiting_agent import read_command; "
    code += f"print(read_command({reader}), os.environ['ADDED'], 'REMOVED' in os.environ)"
    monkeypatch.setenv("REMOVED", "1")
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[reader], stdout=subprocess.PIPE) as agent:
        os.write(writer, f"{text}\n".encode())
        try:
            assert agent.communicate(timeout=30)[0] == b"['--nnodes=1'] 1 False\n"
        finally:
            agent.kill()
            os.close(writer)
            os.close(reader)


def test_agent_gets_what_the_recipe_changed_in_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Variables that its module sets or removes, and the limit on open files, which is raised to what the job needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMOVED", "1")
    monkeypatch.setenv("CHANGED", "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    write = 'echo "${REMOVED-none} $CHANGED $ADDED $OWN $(ulimit -n)" > $RANK'
    torchrun = ("--nproc-per-node=1", "--local-addr=127.0.0.1", "--no-python", "bash", "-c", write)
    with waiting_agent([]) as waiting:
        assert waiting is not None
        monkeypatch.delenv("REMOVED")
        monkeypatch.setenv("CHANGED", "after")
        monkeypatch.setenv("ADDED", "\udcff")
        monkeypatch.setenv("OWN", "the driver's")
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        try:
            agent = waiting.hand_over(Command((sys.executable, "-m", AGENT_MODULE, *torchrun), {"OWN": "command's"}))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert agent is not None
    assert agent.wait(100) == 0
    assert (tmp_path / "0").read_bytes() == f"none after \udcff command's {soft - 1}\n".encode(errors="surrogateescape")
