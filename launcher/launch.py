"""The driver: checks a run, starts torchrun for it, passes on what people ask, and ends when it ends. No torch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from launcher import failure
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEST
from launcher.gpus import count_gpus
from launcher.opening import Opened, begin, opened, path_of
from launcher.process import catches, children, end
from launcher.questions import closed, settled
from launcher.redact import redact
from launcher.runfolder import RUNS, RunFolder
from launcher.settings import Run
from launcher.signals import handled
from launcher.sinks.jsonl import add
from launcher.threads import asked_threads, threads_of
from launcher.tune import auto
from launcher.tune.auto import Settled, Unmeasured
from launcher.worker import Assignment

__all__ = ["Command", "command", "drive", "in_memory", "killed", "probing", "tell", "unmeasured", "workers_of"]

LOOK_EVERY_S = 0.05
WORKERS = "--nproc-per-node="
MANY = 1_000_000  # torchrun's own count of restarts is no limit: it knows nothing of checkpoints


@dataclass(frozen=True)
class Command:
    """What is started: argument list, and what is added to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]

    def line(self) -> str:
        """As one would type it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.argv])


def command(run: Run, workers: int, handover: Path, report: Path) -> Command:
    """torchrun on this machine, on the loopback, with `workers` processes that read from `handover` what to do."""
    argv = (
        sys.executable,
        "-m",
        "launcher.agent",
        f"--failures={report}",
        "--nnodes=1",
        f"{WORKERS}{workers}",
        f"--max-restarts={MANY}",
        "--local-addr=127.0.0.1",
        "--monitor-interval=0.1",
        "-m",
        "launcher",
        "worker",
        str(handover),
    )
    return Command(argv, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **alone(run, workers)})


def probing(run: Run, workers: int, handover: Path) -> Command:
    """One process that has `workers` others measure, forked from it, on the loopback too."""
    argv = (sys.executable, "-m", "launcher", "probe", f"{WORKERS}{workers}", str(handover))
    return Command(argv, alone(run, workers))


def alone(run: Run, workers: int) -> Mapping[str, str]:
    """What keeps `workers` to themselves on this machine: each its share of the cores, all on the loopback."""
    asked = asked_threads(run)
    return {
        "OMP_NUM_THREADS": str(threads_of(run, workers, asked)),
        **asked,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **run.launch.env,
    }


def workers_of(run: Run) -> int:
    """`launch.workers`, else one per GPU, else 1."""
    if run.launch.workers is not None:
        return run.launch.workers
    return 1 if run.train.device == "cpu" else max(1, count_gpus())


def drive(run: Run) -> int:
    """One run from start to end; returns its exit status.

    Raises:
        RequestError: the request is wrong; nothing was created.
    """
    workers = workers_of(run)
    try:
        asked = without_questions(run, workers)
    except Unmeasured as error:
        return unmeasured(error, run)
    found = opened(asked.run, workers)
    if found.complete:
        print(found.summary())
        return EXIT_OK
    if run.launch.dry:
        print(command(found.run, workers, Path("HANDOVER.json"), Path("FAILURES.json")).line())
        return EXIT_OK
    for line in found.study.advice:
        tell(f"note: {line}")
    made = found.folder.create()
    lock = found.folder.lock()
    try:
        begin(found, asked.profile)
        with tempfile.TemporaryDirectory(prefix="launcher-") as private:
            status = Job(found, workers, Path(private), asked).run()
        if status == EXIT_REQUEST and made is not None:
            found.folder.discard(made)  # a wrong request leaves nothing behind, also where only the workers could tell
        return status
    finally:
        lock.release()


def without_questions(run: Run, workers: int) -> Settled:
    """The run with answers to what it leaves open: its folder's, else those of a kept or a new measurement.

    Raises:
        RequestError: the request is wrong; nothing was measured.
        Unmeasured: it could not be measured.
    """
    found = closed(run, workers)
    if found is not None:
        return found
    if run.launch.dry:
        return Settled(auto.stood_in(run))
    from launcher.tune import drive as tuning

    tell(f"note: {auto.looking(run)}")
    document = tuning.found(auto.question(run), workers, look=True)
    return settled(run, document, path_of(run, None, 1))


def unmeasured(error: Unmeasured, run: Run) -> int:
    """Say why, and the exit status."""
    tell(f"error: {error}")
    if run.debug and error.trace:
        tell(error.trace, whole=True)
    return EXIT_FAILED


class Job:
    """One torchrun under way: started, watched, asked to stop, reported on."""

    def __init__(self, found: Opened, workers: int, private: Path, asked: Settled) -> None:
        self._folder: RunFolder = found.folder
        self._run = found.run
        self._first = found.folder.generation() + 1
        self._report = private / "failures.json"
        given = Assignment.of(found, loopback=True, why=asked.why, profile=asked.profile)
        assignment = replace(given, first=self._first)
        self._handover = in_memory(assignment.to_json())
        path = Path(f"/proc/{os.getpid()}/fd/{self._handover}")
        self._command = command(found.run, workers, path, self._report)
        self._asked = self._seen = 0
        self._told: set[int] = set()

    def run(self) -> int:
        with handled(self._ask):
            env = os.environ | self._command.env
            agent = subprocess.Popen(self._command.argv, env=env, start_new_session=True)
            try:
                return self._watch(agent)
            finally:
                end(agent)
                os.close(self._handover)

    def _watch(self, agent: subprocess.Popen[bytes]) -> int:
        """Until the agent ends, or there is no point in letting it start the workers again."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(LOOK_EVERY_S)
            if self._asked > 1:
                return EXIT_INTERRUPTED
            if agent.returncode == 0:
                return self._ended_well()
            generation, since = self._folder.generation(), max(self._first, self._folder.saved_generation())
            found = failure.first(self._folder.logs, since)
            again, self._seen = generation > max(self._seen, self._first), generation
            ended = self._written_down(generation - 1) if again else None
            hopeless = (found is not None and found.final) or generation - since > self._run.elastic.max_restarts
            if agent.returncode is not None or hopeless:
                end(agent)
                self._written_down(generation)
                return self._failed(found)
            if again:
                why = "a worker was killed or asked to leave" if ended is None else ended.line()
                tell(f"restart {generation - self._first}: {why}")
            if self._asked:
                self._pass_on(agent.pid)

    def _written_down(self, generation: int) -> failure.Failure | None:
        """What ended a start of the workers; an event too, where rank 0, whose events these are, wrote none of it.

        Only while no worker writes: those of that start are dead, and the next rank 0 still has torch to import.
        """
        found = failure.cause(self._folder.logs, generation) if generation >= self._first else None
        if found is not None and not failure.written(self._folder.events, found):
            with suppress(OSError):  # a full disk: the line on the screen and the record in logs/ stay
                add(self._folder.events, found.event())
        return found

    def _ask(self, number: int, _: FrameType | None) -> None:
        """Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal ask the workers to save and stop; a second Ctrl-C ends all."""
        if not self._asked:
            self._asked = 1
            name = signal.Signals(number).name
            self._folder.ask_to_stop(name)
            more = " (once more ends at once)" if number == signal.SIGINT else ""
            tell(f"{name}: saving at the next update, then stopping{more}")
        elif number == signal.SIGINT:
            self._asked = 2

    def _pass_on(self, agent: int) -> None:
        """SIGUSR1 to each worker once it can take it; before that the stop file speaks."""
        for pid in children(agent):
            if pid not in self._told and catches(pid, signal.SIGUSR1):
                self._told.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)

    def _ended_well(self) -> int:
        if self._folder.read_done() is None:
            name, path = self._run.run.name, self._folder.path
            where = f"run.name={name}" if path == RUNS / str(name) else f"run.dir={path}"
            tell(f"stopped after saving: the same command with {where} goes on from there")
        self._folder.clear_stop()
        return EXIT_OK

    def _failed(self, found: failure.Failure | None) -> int:
        """Where nobody has more to say than that another has gone, that one was killed without a word."""
        line = f"logs: {self._folder.logs}" if found is None else found.line()
        if found is None or (found.status != EXIT_REQUEST and failure.consequence(found.message)):
            why = killed(self._report) if self._report.exists() else "the workers were killed again and again"
            line = f"{why} ({line})"
        tell(f"error: {line}")
        if found is not None and self._run.debug:
            tell(found.traceback, whole=True)
        return EXIT_REQUEST if found is not None and found.status == EXIT_REQUEST else EXIT_FAILED


def in_memory(text: str) -> int:
    """A file that only this user's processes can read, on no disk, and gone with this process: it holds secrets."""
    number = os.memfd_create("handover")
    os.write(number, text.encode())
    return number


def killed(report: Path) -> str:
    """What the agent knows of workers that left no last word."""
    try:
        codes: dict[str, int] = json.loads(report.read_text())
    except (OSError, ValueError):
        return "torchrun ended without a word"
    return failure.departed({int(rank): code for rank, code in codes.items()}) or "torchrun failed"


def tell(text: str, *, whole: bool = False) -> None:
    print(redact(text if whole else " ".join(text.split())), file=sys.stderr, flush=True)
