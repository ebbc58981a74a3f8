"""One rank's part of measuring, in a process of its own, which ends with it.

That process is forked from one that has imported what measuring needs: importing it takes seconds, forking a hundredth
of one. Where a copy of this process could not compute, it is started anew instead.
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
    """What the process is to do. `number` is that of its round, from 0, `earlier` what the rounds before found out.

    The processes of one round meet in the part `prefix` of the job's store; `private` is a folder of this one's.
    """

    run: Mapping[str, Any]
    look: bool
    number: int
    prefix: str
    private: str
    earlier: Mapping[str, Any] | None = None


class Sent(Protocol):
    """A process under way. `poll`: its exit status, below 0 the signal that ended it; None until then."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> object: ...


class Forked:
    """`Sent` of multiprocessing's. It leaves by os._exit: nothing of the process that it is a copy of is torn down."""

    def __init__(self, process: ForkProcess) -> None:
        self._process = process
        self.poll = lambda: process.exitcode
        self.kill = process.kill
        self.wait = process.join


def sent(errand: Errand, env: Mapping[str, str]) -> Sent:
    """Start the process, with `env` added to the environment of this one."""
    if forkable():
        process = multiprocessing.get_context("fork").Process(target=_in_a_copy, args=(errand, env, os.getpid()))
        process.start()
        return Forked(process)
    handover = Path(errand.private) / "handover.json"
    write_whole(handover, json.dumps(asdict(errand)))
    argv = [sys.executable, "-m", "launcher", "probe", str(handover)]
    return subprocess.Popen(argv, env={**os.environ, **env}, stdout=2)


def forkable() -> bool:
    """Whether a copy of this process can compute: it has neither a device's context nor OpenMP's threads.

    Threads are not copied, and a region that waits for them waits for ever; with one thread there never were any. A
    device that was only asked how many there are cannot be used by a copy either, which an open file of its tells.
    """
    import torch

    asked = torch.cuda.is_initialized() or holds(lambda path: path.startswith(DEVICES))
    return torch.get_num_threads() == 1 and not asked


def _in_a_copy(errand: Errand, env: Mapping[str, str], parent: int) -> None:
    as_if_started(parent)
    os.dup2(2, 1)  # what a recipe prints must not get into the document
    os.environ.update(env)
    sys.exit(_done(errand))


def main(path: str) -> int:
    """The process where it was started anew, with the file that hands the errand over."""
    die_with_parent()
    return _done(Errand(**json.loads(Path(path).read_text())))


def _done(errand: Errand) -> int:
    """The exit status. What is wrong is written down for those to tell who sent us."""
    from launcher.tune.probe import Lost

    topology, private = (Topology.of() or Topology()).started(errand.number + 1), Path(errand.private)
    try:
        return _measured(errand, topology, private)
    except Lost:
        os._exit(EXIT_LOST)  # the others see that it has gone, and all are started again
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
