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

from launcher import failure
from launcher.durable import write_whole
from launcher.errors import EXIT_AGAIN, EXIT_FAILED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.keys import from_mapping
from launcher.process import as_if_started, die_with_parent, holds
from launcher.topology import Topology
from launcher.tune.rounds import EXIT_LOST, RESULT, STATE

__all__ = ["Errand", "Sent", "forkable", "main", "sent"]

DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/davinci", "/dev/dri/render")


@dataclass(frozen=True)
class Errand:
    """What the process measures. `number`: the attempt, from 0. `earlier`: the results of earlier attempts.

    The processes of one attempt connect under `prefix` in the job's store; `private` is this process's own folder.
    """

    run: Mapping[str, Any]
    look: bool
    number: int
    prefix: str
    private: str
    earlier: Mapping[str, Any] | None = None


class Sent(Protocol):
    """A running process. `poll` returns its exit status (negative: the signal that ended it), or None while it runs."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> object: ...


class Forked:
    """`Sent` for a multiprocessing fork. It exits by os._exit, so no cleanup of the parent process runs in the copy."""

    def __init__(self, process: ForkProcess) -> None:
        self._process = process
        self.poll = lambda: process.exitcode
        self.kill = process.kill
        self.wait = process.join


def sent(errand: Errand, env: Mapping[str, str]) -> Sent:
    """Start the measuring process, with `env` added to the current environment."""
    if forkable():
        process = multiprocessing.get_context("fork").Process(target=_in_a_copy, args=(errand, env, os.getpid()))
        process.start()
        return Forked(process)
    handover = Path(errand.private) / "handover.json"
    write_whole(handover, json.dumps(asdict(errand)))
    argv = [sys.executable, "-m", "launcher", "probe", str(handover)]
    return subprocess.Popen(argv, env={**os.environ, **env}, stdout=2)


def forkable() -> bool:
    """Whether a forked copy of this process can compute: it has no device context and no OpenMP threads.

    Threads are not copied by fork, and a parallel region would wait for them forever; with one thread none exist. After
    a mere device count a copy cannot use the device either; an open device file reveals that.
    """
    import torch

    asked = torch.cuda.is_initialized() or holds(lambda path: path.startswith(DEVICES))
    return torch.get_num_threads() == 1 and not asked


def _in_a_copy(errand: Errand, env: Mapping[str, str], parent: int) -> None:
    as_if_started(parent)
    os.dup2(2, 1)  # keep output of the recipe out of the document
    os.environ.update(env)
    sys.exit(_done(errand))


def main(path: str) -> int:
    """Entry point of a newly started (not forked) process; `path` is the file that holds the task."""
    die_with_parent()
    return _done(Errand(**json.loads(Path(path).read_text())))


def _done(errand: Errand) -> int:
    """Measure and return the exit status; an error is recorded for the starting process to report."""
    from launcher.tune.probe import Lost

    topology, private = (Topology.of() or Topology()).started(errand.number + 1), Path(errand.private)
    try:
        return _measured(errand, topology, private)
    except Lost:
        os._exit(EXIT_LOST)  # the other ranks notice the exit, and all are restarted
    except Exception as error:
        final = isinstance(error, RequestError)
        failure.record(private, *topology.place, error, private, final=final)
        if failure.consequence(str(error)):
            os._exit(EXIT_AGAIN)
        return EXIT_REQUEST if final else EXIT_FAILED


def _measured(errand: Errand, topology: Topology, private: Path) -> int:
    from torch.distributed import PrefixStore

    from launcher import rendezvous
    from launcher.tune.session import Earlier, measured

    run, state = from_mapping(errand.run), private / STATE if topology.rank == 0 else None
    earlier = Earlier() if errand.earlier is None else Earlier.from_facts(errand.earlier)
    store = PrefixStore(errand.prefix, rendezvous.meet(topology, loopback=False, timeout_s=run.launch.timeout_s))
    found = measured(run, topology, store, earlier, state, look=errand.look)
    if topology.rank == 0:
        (private / RESULT).write_text(json.dumps(found))
    return EXIT_OK
