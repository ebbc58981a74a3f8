"""One rank from start to end: resolve the job, connect to the other ranks, train, exit with the right status.

Only rank 0 composes the configuration and opens the run folder; it then sends the resolved configuration to the other
ranks through the store, so that they cannot disagree. It does so before importing torch, so that an invalid
configuration is reported immediately.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from launcher import failure, logs
from launcher.errors import EXIT_AGAIN, EXIT_FAILED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.keys import from_mapping, to_mapping
from launcher.manifest import newest_of
from launcher.process import die_with_parent
from launcher.queue import claimed
from launcher.redact import redact
from launcher.runfolder import Lock, Recalled, RunFolder, recall, remember
from launcher.settings import Run
from launcher.topology import Topology
from launcher.tune import auto
from launcher.tune.auto import Settled, Unmeasured

if TYPE_CHECKING:
    from torch.distributed import Store

    from launcher.heart import Heart, Still
    from launcher.opening import Opened
    from launcher.signals import Wishes

__all__ = ["Assignment", "main", "main_handover"]


@dataclass(frozen=True)
class Assignment:
    """The job of the ranks: the resolved configuration and the run folder.

    `checkpoint` was given by the user, and `must` requires that a checkpoint exists; both apply until this job has
    saved a checkpoint of its own, i.e. until the newest one in the folder differs from `before`. `changed` (the keys
    that differ from the folder's configuration) applies only to the first start of the job, generation `first` (None:
    this one). `restarted`: this job has started its workers before. `loopback`: the job runs on one machine with our
    own store. `summary`: the run is already complete, and only this text is printed. `why`: values that were chosen
    automatically for this command, and the reason. `profile`: the timing profile that batch=goodput uses.
    """

    run: Run
    folder: RunFolder
    generation: int = 0
    first: int | None = None
    restarted: bool = False
    before: str | None = None
    loopback: bool = False
    checkpoint: Path | None = None
    must: bool = False
    changed: Mapping[str, Any] = field(default_factory=dict)
    summary: str | None = None
    why: str = ""
    profile: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, opened: Opened, *, loopback: bool, why: str = "", profile: Mapping[str, Any] | None = None
    ) -> Assignment:
        decision = opened.decision
        return cls(
            run=opened.run,
            folder=opened.folder,
            loopback=loopback,
            why=why,
            profile=profile,
            before=newest_of(opened.folder.checkpoints_in(opened.run.checkpoint.dir)),
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
        """The job for another start of the workers; once this job has saved, it always continues from there."""
        generation = self.folder.next_generation()
        if not self.restarted and generation == (self.first or generation):
            return replace(self, generation=generation)
        self.folder.count_restart()
        again = replace(self, generation=generation, restarted=True, changed={}, why="")
        saved = newest_of(self.folder.checkpoints_in(self.run.checkpoint.dir)) != self.before
        return replace(again, checkpoint=None, must=False) if saved else again


@dataclass(frozen=True)
class Claim:
    """Rank 0's claim on the run folder: the lock, unless the driver holds it, and the topmost created folder."""

    assignment: Assignment
    lock: Lock | None = None
    made: Path | None = None

    def refused(self) -> None:
        """Remove the folders that were created, because the configuration is invalid."""
        if self.made is not None:
            self.assignment.folder.discard(self.made)


@dataclass(frozen=True)
class Question:
    """A measurement by all ranks that rank 0 needs before it can open the run. `token` is unique."""

    run: Run
    token: str

    def to_json(self) -> str:
        return json.dumps({"question": to_mapping(self.run), "token": self.token})


#: Makes rank 0's decision from what earlier starts decided and from the measurement, if any.
Assign = Callable[[Recalled | None, Mapping[str, Any] | None], Claim | Question]


def main(args: Sequence[str], topology: Topology) -> int:
    """Entry point under the user's own torchrun: rank 0 composes the configuration from the command line."""
    return serve(topology, lambda known, found: composed(args, topology, known, found), loopback=False)


def main_handover(path: str, topology: Topology) -> int:
    """Entry point under the driver's agent: the driver has written the composed job to a private file."""
    return serve(topology, lambda *_: Claim(Assignment.from_json(Path(path).read_text()).started()), loopback=True)


def composed(
    args: Sequence[str], topology: Topology, recalled: Recalled | None, measured: Mapping[str, Any] | None = None
) -> Claim | Question:
    """Compose the job on rank 0 under the user's own torchrun; a restart continues in the `recalled` folder.

    Returns a MeasurementRequest if an open value, e.g. batch.per_device=auto, has not been `measured` yet.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
    """
    from launcher.config import resolve
    from launcher.opening import begin, opened

    resolution = resolve(args)
    known = recalled or queued_again(resolution.run, topology)
    folder = None if known is None else known.folder
    asked = without_questions(resolution.run, topology, folder, measured)
    if isinstance(asked, Question):
        return asked
    found = opened(asked.run, topology.world, known=folder, run_id=topology.run_id, nodes=topology.nodes)
    assignment = Assignment.of(found, loopback=False, why=asked.why, profile=asked.profile)
    if known is not None:
        assignment = replace(assignment, restarted=True, before=known.newest)
    if found.complete:
        return Claim(replace(assignment, summary=found.summary()))
    if known is None:
        for line in (*resolution.notes, *found.study.advice, *restart_notes(found.run, topology)):
            tell(f"note: {line}")
    made = found.folder.create()
    lock = found.folder.lock(torchrun=os.getppid())
    begin(found, asked.profile)
    remember(Recalled(found.folder.path, assignment.before))
    return Claim(assignment.started(), lock, made)


def without_questions(
    run: Run, topology: Topology, folder: Path | None, measured: Mapping[str, Any] | None
) -> Settled | Question:
    """Resolve open values from the run folder or from `measured`; else return the MeasurementRequest.

    Raises:
        UsageError: the configuration is invalid, whatever a measurement would yield.
    """
    from launcher.opening import path_of
    from launcher.questions import closed, settled

    if measured is not None:
        return settled(run, measured, folder or path_of(run, topology.run_id, topology.nodes))
    found = closed(run, topology.world, known=folder, run_id=topology.run_id, nodes=topology.nodes)
    if found is not None:
        return found
    tell(f"note: {auto.looking(run)}")
    return Question(auto.question(run), os.urandom(8).hex())


def queued_again(run: Run, topology: Topology) -> Recalled | None:
    """The decision of an earlier start of the same Slurm job, whose script sets run.dir; None if there is none."""
    if not topology.requeued or run.run.dir is None:
        return None
    folder = RunFolder(Path(run.run.dir))
    kept = claimed(folder)
    if kept is None or kept["job"] != topology.slurm_job or not folder.run_yaml.exists():
        return None
    return Recalled(folder.path, kept["newest"])


def restart_notes(run: Run, topology: Topology) -> Iterator[str]:
    if topology.restarts_left <= 0:
        again = f"run.name={run.run.name} continues from its newest checkpoint"
        yield f"torchrun has no restarts left (--max-restarts): a dead worker ends the job; {again}"


def serve(topology: Topology, assign: Assign, *, loopback: bool) -> int:
    """Run a rank from start to end; return its exit status.

    Rank 0 decides before it connects to the other ranks, so that an invalid configuration is reported immediately. If
    its node may have joined a job that other nodes already know, it first asks them.

    Raises:
        UsageError: on rank 0 only, the configuration is invalid.
    """
    die_with_parent()
    wishes = early_wishes()
    try:
        claim, text, store = agreed(topology, assign, loopback)
    except Unmeasured as error:
        return say_unmeasured(error, topology)
    if not text:
        return EXIT_REQUEST  # rank 0 reports the error
    from launcher import session

    assignment = claim.assignment if claim else Assignment.from_json(text)
    if assignment.summary is not None:
        return say_complete(assignment.summary, topology)
    topology = topology.started(assignment.generation)
    screen = logs.redirect(assignment.folder.log(*topology.place), topology.rank, debug=assignment.run.debug)
    heart = heart_of(assignment, topology, screen)
    try:
        return session.run(assignment, topology, store, wishes, heart)
    except Exception as error:
        heart.stop()
        status = fail(assignment, topology, error, screen)
        if claim is not None and status == EXIT_REQUEST:
            claim.refused()
        if status == EXIT_AGAIN and not active_children():
            leave(status)
        return status
    finally:
        wishes.done()
        if claim is not None and claim.lock is not None:
            claim.lock.release()


def agreed(topology: Topology, assign: Assign, loopback: bool) -> tuple[Claim | None, str, Store]:
    """Agree on the job: return rank 0's claim (None elsewhere), the job as JSON, and a sub-store for later use.

    Raises:
        UsageError: on rank 0 only, the configuration is invalid; the other ranks receive empty text.
        MeasurementError: on every rank, the measurement failed.
    """
    own = None if loopback else recall()
    knows = own is not None or loopback or topology.nodes == 1
    word = assign(own, None) if topology.rank == 0 and knows else None
    from launcher import rendezvous

    timeout_s = settings_of(word).launch.timeout_s if word else 600.0
    store = rendezvous.meet(topology, loopback=loopback, timeout_s=timeout_s)
    said, store = rendezvous.gathered(store, topology, own.to_json() if own else "", timeout_s)
    known = own or next((Recalled.from_json(text) for text in said if text), None)
    if topology.rank == 0 and word is None:
        word = decided(assign, known, None, store)
    text = rendezvous.handed(store, told(word))
    if text and "question" in json.loads(text):
        from launcher.tune.beside import measured

        found = measured(json.loads(text), topology, store)
        store = rendezvous.within(store, "answered")
        word = decided(assign, known, found, store) if topology.rank == 0 else None
        text = rendezvous.handed(store, told(word))
    if text and not loopback and known is None and topology.rank and topology.local_rank == 0:
        recalled = Assignment.from_json(text)
        remember(Recalled(recalled.folder.path, recalled.before))  # rank 0 may be on another node at the next start
    return word if isinstance(word, Claim) else None, text, store


def settings_of(word: Claim | Question) -> Run:
    return word.assignment.run if isinstance(word, Claim) else word.run


def told(word: Claim | Question | None) -> str | None:
    """The text that rank 0 sends to the other ranks."""
    return None if word is None else word.to_json() if isinstance(word, Question) else word.assignment.to_json()


def decided(assign: Assign, known: Recalled | None, found: Mapping[str, Any] | None, store: Store) -> Claim | Question:
    """Make rank 0's decision while the other ranks wait for it; on an error, let them exit.

    Raises:
        UsageError: the configuration is invalid.
    """
    from launcher import rendezvous

    try:
        return assign(known, found)
    except BaseException:
        rendezvous.handed(store, "")
        raise


def leave(status: int) -> NoReturn:
    """Exit without tearing torch down, which takes a second: the agent waits for this process before a restart."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def heart_of(assignment: Assignment, topology: Topology, screen: TextIO) -> Heart | Still:
    from launcher.heart import Heart
    from launcher.heartbeat import Limits

    elastic, compiles = assignment.run.elastic, assignment.run.train.compile
    limits = Limits(elastic.hang_s, elastic.first_s)
    told = None if assignment.loopback else screen
    return Heart.start(assignment.folder, topology, limits, compiles=compiles, screen=told)


def early_wishes() -> Wishes:
    from launcher.signals import Wishes

    wishes = Wishes()
    wishes.install()
    return wishes


def say_unmeasured(error: Unmeasured, topology: Topology) -> int:
    if topology.rank == 0:
        tell(f"error: {error}")
    return EXIT_FAILED


def say_complete(summary: str, topology: Topology) -> int:
    if topology.rank == 0:
        print(summary)
    return EXIT_OK


def fail(assignment: Assignment, topology: Topology, error: Exception, screen: TextIO) -> int:
    """Record the failure for the driver to report; under the user's own torchrun, one rank prints it here."""
    from launcher.loop import TrainingFailed

    final = isinstance(error, TrainingFailed)
    log = assignment.folder.log(*topology.place)
    found = failure.record(assignment.folder.logs, *topology.place, error, log, final=final)
    logging.getLogger(__name__).error("%s", found.traceback)
    if failure.consequence(found.message) and (assignment.loopback or topology.restarts_left > 0):
        return EXIT_AGAIN
    if not assignment.loopback:
        if failure.speaks(assignment.folder.logs, found):
            print(f"error: {found.line()}", file=screen, flush=True)
            write_down(assignment.folder, found)
        failure.tell_torchrun(error)
    return EXIT_REQUEST if isinstance(error, RequestError) else EXIT_FAILED


def write_down(folder: RunFolder, found: failure.Failure) -> None:
    """Log the failure as an event if rank 0, which writes the events, did not."""
    from launcher.sinks.jsonl import add_beside

    with suppress(OSError):
        if not failure.consequence(found.message) and not failure.written(folder.events, found):
            add_beside(folder.events, found.event())


def tell(text: str) -> None:
    print(redact(text), file=sys.stderr, flush=True)
