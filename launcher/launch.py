"""The driver: checks a run, starts torchrun for it, forwards signals, and ends when it ends. Imports no torch."""

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
MANY = 1_000_000  # the driver limits restarts itself: torchrun's count ignores checkpoints


@dataclass(frozen=True)
class Command:
    """A command to start: its argument list and its additions to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]

    def line(self) -> str:
        """The command as a shell line."""
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.argv])


def command(run: Run, workers: int, handover: Path, report: Path) -> Command:
    """torchrun command for this machine, on the loopback; the `workers` processes read their job from `handover`."""
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
    """Command for a process that forks `workers` measuring processes, also on the loopback."""
    argv = (sys.executable, "-m", "launcher", "probe", f"{WORKERS}{workers}", str(handover))
    return Command(argv, alone(run, workers))


def alone(run: Run, workers: int) -> Mapping[str, str]:
    """Environment that gives each worker its share of the cores and keeps communication on the loopback."""
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
    """Run one job from start to end; return its exit status.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
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
            found.folder.discard(made)  # remove what was created, also if only the workers found the error
        return status
    finally:
        lock.release()


def without_questions(run: Run, workers: int) -> Settled:
    """Resolve open values of the configuration from its run folder, else from a cached or a new measurement.

    Raises:
        UsageError: the configuration is invalid; nothing was measured.
        MeasurementError: the measurement failed.
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
    """Print why the measurement failed; return the exit status."""
    tell(f"error: {error}")
    if run.debug and error.trace:
        tell(error.trace, whole=True)
    return EXIT_FAILED


class Job:
    """A torchrun process: starts it, watches it, forwards stop requests and reports how it ended."""

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
        """Wait until the agent ends, or until restarting the workers is pointless; return the exit status."""
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
                why = "a worker was killed or received SIGTERM" if ended is None else ended.line()
                tell(f"restart {generation - self._first}: {why}")
            if self._asked:
                self._pass_on(agent.pid)

    def _written_down(self, generation: int) -> failure.Failure | None:
        """Return the failure that ended a generation, and log it as an event if rank 0 did not.

        Called only while no worker writes events: the workers of that generation are dead, and the next rank 0 is still
        importing torch.
        """
        found = failure.cause(self._folder.logs, generation) if generation >= self._first else None
        if found is not None and not failure.written(self._folder.events, found):
            with suppress(OSError):  # e.g. disk full: the message on screen and the record in logs/ remain
                add(self._folder.events, found.event())
        return found

    def _ask(self, number: int, _: FrameType | None) -> None:
        """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP request save and stop from the workers; a second Ctrl-C aborts."""
        if not self._asked:
            self._asked = 1
            name = signal.Signals(number).name
            self._folder.ask_to_stop(name)
            more = " (press Ctrl-C again to end at once)" if number == signal.SIGINT else ""
            tell(f"{name}: saving at the next update, then stopping{more}")
        elif number == signal.SIGINT:
            self._asked = 2

    def _pass_on(self, agent: int) -> None:
        """Send SIGUSR1 to each worker that has installed its handler; until then it polls the stop file."""
        for pid in children(agent):
            if pid not in self._told and catches(pid, signal.SIGUSR1):
                self._told.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)

    def _ended_well(self) -> int:
        if self._folder.read_done() is None:
            name, path = self._run.run.name, self._folder.path
            where = f"run.name={name}" if path == RUNS / str(name) else f"run.dir={path}"
            tell(f"stopped after saving: the same command with {where} continues from there")
        self._folder.clear_stop()
        return EXIT_OK

    def _failed(self, found: failure.Failure | None) -> int:
        """Print the error. If all ranks only report a lost peer, the peer was killed: describe its exit code."""
        line = f"logs: {self._folder.logs}" if found is None else found.line()
        if found is None or (found.status != EXIT_REQUEST and failure.consequence(found.message)):
            why = killed(self._report) if self._report.exists() else "the workers were killed repeatedly"
            line = f"{why} ({line})"
        tell(f"error: {line}")
        if found is not None and self._run.debug:
            tell(found.traceback, whole=True)
        return EXIT_REQUEST if found is not None and found.status == EXIT_REQUEST else EXIT_FAILED


def in_memory(text: str) -> int:
    """Write `text` to a memfd: private to this user, never on disk, gone with this process, as it holds secrets."""
    number = os.memfd_create("handover")
    os.write(number, text.encode())
    return number


def killed(report: Path) -> str:
    """Describe workers that died without reporting an error, from the agent's exit codes."""
    try:
        codes: dict[str, int] = json.loads(report.read_text())
    except (OSError, ValueError):
        return "torchrun ended without reporting an error"
    return failure.departed({int(rank): code for rank, code in codes.items()}) or "torchrun failed"


def tell(text: str, *, whole: bool = False) -> None:
    print(redact(text if whole else " ".join(text.split())), file=sys.stderr, flush=True)
