"""One rank from start to end: find out what is to be done, meet the others, train, leave with the right word.

Rank 0 alone composes and opens the run folder, then hands the resolved run to the others through the store, so that
they cannot disagree. It does so before it imports torch: a wrong request is answered at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher import failure, logs
from launcher.errors import EXIT_AGAIN, EXIT_FAILED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.keys import from_mapping, to_mapping
from launcher.process import die_with_parent
from launcher.redact import redact
from launcher.runfolder import RunFolder, recall, remember
from launcher.settings import Run
from launcher.topology import Topology

if TYPE_CHECKING:
    from launcher.heart import Heart, Still
    from launcher.opening import Opened
    from launcher.signals import Wishes

__all__ = ["Assignment", "main", "main_handover"]


@dataclass(frozen=True)
class Assignment:
    """What is to be done: the resolved run and its folder.

    `checkpoint` is one that the user named, `must` says that there has to be one, `changed` which keys differ from the
    folder's: all of them concern the job's first start, generation `first` (None: this one). `restarted`: the workers
    were started before in this job.
    `loopback`: the job lives on one machine and its store is ours. `summary`: nothing is left to do but to say this.
    """

    run: Run
    folder: RunFolder
    generation: int = 0
    first: int | None = None
    restarted: bool = False
    loopback: bool = False
    checkpoint: Path | None = None
    must: bool = False
    changed: Mapping[str, Any] = field(default_factory=dict)
    summary: str | None = None

    @classmethod
    def of(cls, opened: Opened, *, loopback: bool) -> Assignment:
        decision = opened.decision
        return cls(
            run=opened.run,
            folder=opened.folder,
            loopback=loopback,
            checkpoint=decision.checkpoint,
            must=decision.must,
            changed={key: list(values) for key, values in decision.changed.items()},
        )

    def to_json(self) -> str:
        named = None if self.checkpoint is None else str(self.checkpoint)
        facts = {"run": to_mapping(self.run), "folder": str(self.folder.path), "checkpoint": named}
        return json.dumps({**vars(self), **facts})

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        facts = json.loads(text)
        named = facts["checkpoint"] and Path(facts["checkpoint"])
        typed = {"run": from_mapping(facts["run"]), "folder": RunFolder(Path(facts["folder"])), "checkpoint": named}
        return cls(**{**facts, **typed})

    def started(self) -> Assignment:
        """For one more start of the workers: what was said of the checkpoint concerns the job's first start alone."""
        generation = self.folder.next_generation()
        if generation == (self.first or generation):
            return replace(self, generation=generation)
        return replace(self, generation=generation, restarted=True, checkpoint=None, must=False, changed={})


def main(args: Sequence[str], topology: Topology) -> int:
    """A rank under a torchrun of the user's own: rank 0 composes from the command line."""
    return serve(topology, lambda: composed(args, topology), loopback=False)


def main_handover(path: str, topology: Topology) -> int:
    """A rank under the driver's agent, which composed already and left the run in a private file."""
    return serve(topology, lambda: Assignment.from_json(Path(path).read_text()), loopback=True)


def composed(args: Sequence[str], topology: Topology) -> Assignment:
    """Rank 0's part under a torchrun of the user's own; restarts of the same agent go on in the same folder.

    Raises:
        RequestError: the request is wrong; nothing was created.
    """
    from launcher.config import resolve
    from launcher.opening import begin, opened

    resolution = resolve(args)
    known = recall()
    found = opened(resolution.run, topology.world, known=known, run_id=topology.run_id, nodes=topology.nodes)
    assignment = replace(Assignment.of(found, loopback=False), restarted=known is not None)
    if found.complete:
        return replace(assignment, summary=found.summary())
    if known is None:
        for line in (*resolution.notes, *found.study.advice, *restart_notes(found.run, topology)):
            tell(f"note: {line}")
    begin(found)
    remember(found.folder.path)
    return assignment


def restart_notes(run: Run, topology: Topology) -> Iterator[str]:
    if topology.restarts_left <= 0:
        again = f"run.name={run.run.name} goes on from its newest checkpoint"
        yield f"torchrun's restarts are at 0: a dead worker ends the job; {again}"
    elif topology.shares_store:
        yield "restarts in place are surer with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment"


def serve(topology: Topology, assign: Callable[[], Assignment], *, loopback: bool) -> int:
    """Everything a rank does; returns its exit status.

    Raises:
        RequestError: on rank 0 alone, the request is wrong.
    """
    die_with_parent()
    wishes = early_wishes()
    own = assign() if topology.rank == 0 else None
    lock = None
    if own is not None and own.summary is None:
        lock = None if loopback else own.folder.lock(torchrun=os.getppid())
        own = own.started()
    from launcher import rendezvous, session

    store = rendezvous.meet(topology, loopback=loopback, timeout_s=own.run.launch.timeout_s if own else 600.0)
    if own is not None:
        store.set("assignment", own.to_json())
    assignment = own or Assignment.from_json(store.get("assignment").decode())
    if assignment.summary is not None:
        return say_complete(assignment.summary, topology)
    topology = topology.started(assignment.generation)
    screen = logs.redirect(assignment.folder.log(*topology.place), topology.rank, debug=assignment.run.debug)
    heart = heart_of(assignment, topology, screen)
    try:
        return session.run(assignment, topology, store, wishes, heart)
    except Exception as error:
        heart.stop()
        return fail(assignment, topology, error, screen)
    finally:
        if lock is not None:
            lock.release()


def heart_of(assignment: Assignment, topology: Topology, screen: TextIO) -> Heart | Still:
    from launcher.heart import Heart
    from launcher.heartbeat import Limits

    elastic, compiles = assignment.run.elastic, assignment.run.train.compile
    limits = Limits(elastic.hang_s, elastic.first_s)
    return Heart.start(assignment.folder, topology, limits, screen, compiles=compiles)


def early_wishes() -> Wishes:
    from launcher.signals import Wishes

    wishes = Wishes()
    wishes.install()
    return wishes


def say_complete(summary: str, topology: Topology) -> int:
    if topology.rank == 0:
        print(summary)
    return EXIT_OK


def fail(assignment: Assignment, topology: Topology, error: Exception, screen: TextIO) -> int:
    """Write down what went wrong, for the driver or the user's torchrun to show.

    Raises:
        RequestError: `error` itself, where rank 0 is to say it: nobody else will.
    """
    from launcher.loop import TrainingFailed

    final = isinstance(error, TrainingFailed)
    log = assignment.folder.log(*topology.place)
    found = failure.record(assignment.folder.logs, *topology.place, error, log, final=final)
    if isinstance(error, RequestError):
        if topology.rank == 0 and not assignment.loopback:
            raise error
        return EXIT_REQUEST
    logging.getLogger(__name__).error("%s", found.traceback)
    if failure.consequence(found.message):
        return EXIT_AGAIN
    if not assignment.loopback:
        print(f"error: {found.line()}", file=screen, flush=True)
        failure.tell_torchrun(error)
    return EXIT_FAILED


def tell(text: str) -> None:
    print(redact(text), file=sys.stderr, flush=True)
