"""A torchrun agent that is started before its job is known, so that it imports torch while the driver composes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from launcher.config.schema import RunConfig
from launcher.distributed.commands import AGENT_MODULE, Command
from launcher.distributed.starter import make_starter_env

__all__ = ["COMMAND_FLAG", "WaitingAgent", "read_command", "waiting_agent"]

#: Names the file descriptor from which a waiting agent reads its command.
COMMAND_FLAG = "--command-from="
#: Overrides that may choose something else than to train on this machine now.
OTHER_STARTS = ("launch=", "launch.kind=", "launch.dry_run=")


class WaitingAgent:
    """An agent that has been started and waits for its command; it ends with the driver like any other."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        argv = [sys.executable, "-m", AGENT_MODULE, f"{COMMAND_FLAG}{reader}"]
        self._environ = dict(os.environ)
        env = self._environ | make_starter_env()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = os.fdopen(writer, "w")
        with suppress(OSError):  # the driver will start another one, and report what is wrong
            self._process = subprocess.Popen(argv, env=env, start_new_session=True, pass_fds=[reader])
        os.close(reader)

    def hand_over(self, command: Command) -> subprocess.Popen[bytes] | None:
        """Let the agent run a command as this process would run it now; None if it is not there any more.

        A recipe's module may have changed variables since the agent was started, and the check of the machine may have
        raised the limit on open files. A newline ends the message, not the end of the file: processes that the module
        has forked keep the pipe open.
        """
        if self._process is None or self._process.poll() is not None:
            return None
        arguments = command.argv[command.argv.index(AGENT_MODULE) + 1 :]
        changed = {name: value for name, value in os.environ.items() if self._environ.get(name) != value}
        removed = [name for name in self._environ if name not in os.environ]
        message = {"argv": arguments, "unset": removed, "env": changed | dict(command.env)}
        try:
            resource.prlimit(self._process.pid, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
            self._pipe.write(f"{json.dumps(message)}\n")
            self._pipe.close()
        except OSError:
            return None
        process, self._process = self._process, None
        return process

    def discard(self) -> None:
        """End the agent if it still waits."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        with suppress(BrokenPipeError):
            self._pipe.close()

    def discard_unless_needed(self, config: RunConfig) -> None:
        """End the agent where this configuration does not train on this machine at once, or changes its environment."""
        from launcher.goodput.auto_batch import needs_measurement  # not before the agent is started

        launch = config.launch
        if launch.kind == "slurm" or launch.dry_run or launch.env or needs_measurement(config):
            self.discard()


@contextmanager
def waiting_agent(overrides: Sequence[str]) -> Iterator[WaitingAgent | None]:
    """A waiting agent for the job of these overrides, ended with the block if it still waits; None if it may not train.

    An error in the block, such as a wrong configuration, ends the agent too.
    """
    if any(override.lstrip("+~").startswith(OTHER_STARTS) for override in overrides):
        yield None
        return
    agent = WaitingAgent()
    try:
        yield agent
    finally:
        agent.discard()


def read_command(descriptor: int) -> list[str] | None:
    """In the agent: wait for the command, change the environment as it says and return its arguments.

    None if the driver does not need this agent, or ended while it wrote.
    """
    with os.fdopen(descriptor) as pipe:
        text = pipe.readline()
    if not text.endswith("\n"):
        return None
    command = json.loads(text)
    for name in command["unset"]:
        os.environ.pop(name, None)
    os.environ.update(command["env"])
    return list(command["argv"])
