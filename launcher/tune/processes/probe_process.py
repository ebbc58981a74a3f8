"""Run one rank's part of measuring in a process of its own.

The process is forked from one that has already imported what measuring needs: importing takes seconds, forking about
10 ms. If a forked copy of this process could not compute, a new process is started instead.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Protocol

from launcher.config.keys import from_mapping
from launcher.distributed.starter import make_starter_env
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_RESTART, EXIT_USAGE, UsageError
from launcher.run_dir import failures
from launcher.system.atomic_files import atomic_write_text
from launcher.system.processes import die_with_parent, has_open_file, reset_after_fork
from launcher.topology import Topology
from launcher.tune.processes.retries import EXIT_RANK_OOM, RESULT_FILE, STATE_FILE

__all__ = ["ProbeTask", "ProcessHandle", "can_fork", "main", "start_probe"]

DEVICE_PATHS = ("/dev/nvidia", "/dev/kfd", "/dev/davinci", "/dev/dri/render")


@dataclass(frozen=True)
class ProbeTask:
    """What the process measures. `attempt`: its number, from 0. `earlier`: the results of earlier attempts.

    `config` is the configuration as a mapping; with `use_cache`, a cached result is returned if there is one. The
    processes of one attempt connect under `prefix` in the job's store; `private` is this process's own folder.
    """

    config: Mapping[str, Any]
    use_cache: bool
    attempt: int
    prefix: str
    private: str
    earlier: Mapping[str, Any] | None = None


class ProcessHandle(Protocol):
    """A running process. `poll` returns its exit status (negative: the signal that ended it), or None while it runs."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> object: ...


class ForkedProcess:
    """`ProcessHandle` for a multiprocessing fork.

    It exits by os._exit, so no cleanup of the parent process runs in the copy.
    """

    def __init__(self, process: ForkProcess) -> None:
        self.poll = lambda: process.exitcode
        self.kill = process.kill
        self.wait = process.join


def start_probe(task: ProbeTask, env: Mapping[str, str]) -> ProcessHandle:
    """Start the measuring process, with `env` added to the current environment."""
    if can_fork():
        process = multiprocessing.get_context("fork").Process(target=_run_in_fork, args=(task, env, os.getpid()))
        process.start()
        return ForkedProcess(process)
    handover = Path(task.private) / "handover.json"
    atomic_write_text(handover, json.dumps(asdict(task)))
    argv = [sys.executable, "-m", "launcher", "probe", str(handover)]
    return subprocess.Popen(argv, env={**os.environ, **env, **make_starter_env()}, stdout=2)


def can_fork() -> bool:
    """Whether a forked copy of this process can compute: it has no device context and no OpenMP threads.

    Threads are not copied by fork, and a parallel region would wait for them forever; with one thread none exist. After
    a mere device count a copy cannot use the device either; an open device file reveals that.
    """
    import torch

    uses_device = torch.cuda.is_initialized() or has_open_file(lambda path: path.startswith(DEVICE_PATHS))
    return torch.get_num_threads() == 1 and not uses_device


def _run_in_fork(task: ProbeTask, env: Mapping[str, str], parent: int) -> None:
    reset_after_fork(parent)
    os.dup2(2, 1)  # keep output of the recipe out of the document
    os.environ.update(env)
    sys.exit(_run_task(task))


def main(path: str) -> int:
    """Entry point of a newly started (not forked) process; `path` is the file that holds the task."""
    die_with_parent()
    return _run_task(ProbeTask(**json.loads(Path(path).read_text())))


def _run_task(task: ProbeTask) -> int:
    """Measure and return the exit status; an error is recorded for the starting process to report."""
    from launcher.tune.probe import OomInCollective

    topology, private = (Topology.from_env() or Topology()).with_generation(task.attempt + 1), Path(task.private)
    try:
        return _measure_task(task, topology, private)
    except OomInCollective:
        os._exit(EXIT_RANK_OOM)  # the other ranks notice the exit, and all are restarted
    except (Exception, SystemExit) as error:  # the recipe may have called sys.exit
        final = isinstance(error, UsageError)
        failures.write_failure(private, *topology.rank_and_generation, error, private, final=final)
        if failures.is_peer_failure(str(error)):
            os._exit(EXIT_RESTART)
        return EXIT_USAGE if final else EXIT_FAILED


def _measure_task(task: ProbeTask, topology: Topology, private: Path) -> int:
    from torch.distributed import PrefixStore

    from launcher.distributed import rendezvous
    from launcher.tune.session import EarlierAttempt, measure_on_rank

    config, state_file = from_mapping(task.config), private / STATE_FILE if topology.rank == 0 else None
    earlier = EarlierAttempt() if task.earlier is None else EarlierAttempt.from_facts(task.earlier)
    store = PrefixStore(
        task.prefix, rendezvous.connect_store(topology, loopback=False, timeout_s=config.launch.timeout_s)
    )
    document = measure_on_rank(config, topology, store, earlier, state_file, use_cache=task.use_cache)
    if topology.rank == 0:
        (private / RESULT_FILE).write_text(json.dumps(document))
    return EXIT_OK
