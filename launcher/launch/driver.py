"""The driver: checks a run, starts torchrun for it, forwards signals, and ends when it ends. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launcher.config.schema import RunConfig
from launcher.distributed.commands import make_torchrun_command
from launcher.distributed.worker_env import resolve_num_workers
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from launcher.goodput import auto_batch
from launcher.goodput.auto_batch import MeasurementError, ResolvedConfig, report_unmeasured
from launcher.launch.resolve_auto import resolve_from_measurement, resolve_without_measuring
from launcher.run_dir import failures
from launcher.run_dir.open_run import OpenedRun, open_run, run_path, write_run_files
from launcher.run_dir.run_directory import RUNS_DIR, RunDirectory
from launcher.system.processes import handles_signal, kill_process_tree, list_child_pids, write_memfd
from launcher.system.signal_handlers import forward_signals_to
from launcher.system.stderr import print_stderr
from launcher.telemetry.sinks.jsonl import append_line
from launcher.train.job_spec import JobSpec

__all__ = ["describe_killed", "launch_job", "print_stderr"]

AGENT_POLL_S = 0.05


def launch_job(config: RunConfig) -> int:
    """Run one job from start to end; return its exit status.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
    """
    workers = resolve_num_workers(config)
    try:
        asked = resolve_auto_values(config, workers)
    except MeasurementError as error:
        return report_unmeasured(error, config)
    found = open_run(asked.config, workers)
    if found.is_complete:
        print(found.format_summary())
        return EXIT_OK
    if config.launch.dry_run:
        print(
            make_torchrun_command(
                found.config, workers, Path("HANDOVER.json"), Path("FAILURES.json")
            ).format_shell_line()
        )
        return EXIT_OK
    for line in found.training_plan.advice:
        print_stderr(f"note: {line}")
    made = found.run_dir.create()
    lock = found.run_dir.lock()
    try:
        write_run_files(found, asked.profile)
        with tempfile.TemporaryDirectory(prefix="launcher-") as private:
            status = TorchrunJob(found, workers, Path(private), asked).run()
        if status == EXIT_USAGE and made is not None:
            found.run_dir.discard(made)  # remove what was created, also if only the workers found the error
        return status
    finally:
        lock.release()


def resolve_auto_values(config: RunConfig, workers: int) -> ResolvedConfig:
    """Resolve open values of the configuration from its run folder, else from a cached or a new measurement.

    Raises:
        UsageError: the configuration is invalid; nothing was measured.
        MeasurementError: the measurement failed.
    """
    found = resolve_without_measuring(config, workers)
    if found is not None:
        return found
    if config.launch.dry_run:
        return ResolvedConfig(auto_batch.with_placeholder_batch(config))
    from launcher.tune import driver as tuning

    print_stderr(f"note: {auto_batch.lookup_note(config)}")
    document = tuning.measure(auto_batch.tuning_config(config), workers, use_cache=True)
    return resolve_from_measurement(config, document, run_path(config, None, 1))


class TorchrunJob:
    """A torchrun process: starts it, watches it, forwards stop requests and reports how it ended."""

    def __init__(self, found: OpenedRun, workers: int, private: Path, asked: ResolvedConfig) -> None:
        self._run_dir: RunDirectory = found.run_dir
        self._config = found.config
        self._first = found.run_dir.read_generation() + 1
        self._report = private / "failures.json"
        given = JobSpec.from_opened(found, loopback=True, why=asked.why, profile=asked.profile)
        job_spec = replace(given, first=self._first)
        self._handover = write_memfd(job_spec.to_json())
        path = Path(f"/proc/{os.getpid()}/fd/{self._handover}")
        self._command = make_torchrun_command(found.config, workers, path, self._report)
        self._signal_count = self._seen = 0
        self._signalled_pids: set[int] = set()

    def run(self) -> int:
        with forward_signals_to(self._on_signal):
            env = os.environ | self._command.env
            agent = subprocess.Popen(self._command.argv, env=env, start_new_session=True)
            try:
                return self._wait_for_agent(agent)
            finally:
                kill_process_tree(agent)
                os.close(self._handover)

    def _wait_for_agent(self, agent: subprocess.Popen[bytes]) -> int:
        """Wait until the agent ends, or until restarting the workers is pointless; return the exit status."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(AGENT_POLL_S)
            if self._signal_count > 1:
                return EXIT_INTERRUPTED
            if agent.returncode == 0:
                return self._finish_successfully()
            generation, since = self._run_dir.read_generation(), max(self._first, self._run_dir.read_saved_generation())
            found = failures.first_failure(self._run_dir.logs, since)
            again, self._seen = generation > max(self._seen, self._first), generation
            ended = self._record_failure(generation - 1) if again else None
            hopeless = (found is not None and found.is_fatal) or generation - since > self._config.elastic.max_restarts
            if agent.returncode is not None or hopeless:
                kill_process_tree(agent)
                self._record_failure(generation)
                return self._report_failure(found)
            if again:
                why = "a worker was killed or received SIGTERM" if ended is None else ended.summary()
                print_stderr(f"restart {generation - self._first}: {why}")
            if self._signal_count:
                self._forward_stop(agent.pid)

    def _record_failure(self, generation: int) -> failures.RankFailure | None:
        """Return the failure that ended a generation, and log it as an event if rank 0 did not.

        Called only while no worker writes events: the workers of that generation are dead, and the next rank 0 is still
        importing torch.
        """
        found = failures.root_cause(self._run_dir.logs, generation) if generation >= self._first else None
        if found is not None and not failures.is_logged(self._run_dir.events, found):
            with suppress(OSError):  # e.g. disk full: the message on screen and the record in logs/ remain
                append_line(self._run_dir.events, found.to_event())
        return found

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP request save and stop from the workers; a second Ctrl-C aborts."""
        if not self._signal_count:
            self._signal_count = 1
            name = signal.Signals(number).name
            self._run_dir.request_stop(name)
            more = " (press Ctrl-C again to end at once)" if number == signal.SIGINT else ""
            print_stderr(f"{name}: saving at the next update, then stopping{more}")
        elif number == signal.SIGINT:
            self._signal_count = 2

    def _forward_stop(self, agent: int) -> None:
        """Send SIGUSR1 to each worker that has installed its handler; until then it polls the stop file."""
        for pid in list_child_pids(agent):
            if pid not in self._signalled_pids and handles_signal(pid, signal.SIGUSR1):
                self._signalled_pids.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)

    def _finish_successfully(self) -> int:
        if self._run_dir.read_done() is None:
            name, path = self._config.run.name, self._run_dir.path
            where = f"run.name={name}" if path == RUNS_DIR / str(name) else f"run.dir={path}"
            print_stderr(f"stopped after saving: the same command with {where} continues from there")
        self._run_dir.clear_stop()
        return EXIT_OK

    def _report_failure(self, found: failures.RankFailure | None) -> int:
        """Print the error. If all ranks only report a lost peer, the peer was killed: describe its exit code."""
        line = f"logs: {self._run_dir.logs}" if found is None else found.summary()
        if found is None or (found.status != EXIT_USAGE and failures.is_peer_failure(found.message)):
            why = describe_killed(self._report) if self._report.exists() else "the workers were killed repeatedly"
            line = f"{why} ({line})"
        print_stderr(f"error: {line}")
        if found is not None and self._config.debug:
            print_stderr(found.traceback, multiline=True)
        return EXIT_USAGE if found is not None and found.status == EXIT_USAGE else EXIT_FAILED


def describe_killed(report: Path) -> str:
    """Describe workers that died without reporting an error, from the agent's exit codes."""
    try:
        codes: dict[str, int] = json.loads(report.read_text())
    except (OSError, ValueError):
        return "torchrun ended without reporting an error"
    return failures.describe_exit_codes({int(rank): code for rank, code in codes.items()}) or "torchrun failed"
