"""The driver: checks a run, starts torchrun for it, forwards signals, and ends when it ends. Imports no torch."""

from __future__ import annotations

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
from launcher.launch.resolve_auto import make_unmeasured_config, resolve_from_measurement, resolve_without_measuring
from launcher.run_dir import failures
from launcher.run_dir.failed_starts import FailedStarts
from launcher.run_dir.open_run import OpenedRun, open_run, run_path, write_run_files
from launcher.run_dir.run_directory import RUNS_DIR, RunDirectory
from launcher.system.processes import handles_signal, kill_process_tree, list_child_pids, write_memfd
from launcher.system.signal_handlers import forward_signals_to
from launcher.system.stderr import print_stderr
from launcher.telemetry.sinks.jsonl import append_line
from launcher.train.job_spec import JobSpec

__all__ = ["launch_job"]

AGENT_POLL_S = 0.05


def launch_job(config: RunConfig) -> int:
    """Run one job from start to end; return its exit status.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
    """
    workers = resolve_num_workers(config)
    try:
        resolved, opened = resolve_and_open(config, workers)
    except MeasurementError as error:
        return report_unmeasured(error, config)
    if opened.is_complete:
        print(opened.format_summary())
        return EXIT_OK
    if config.launch.dry_run:
        command = make_torchrun_command(opened.config, workers, Path("HANDOVER.json"), Path("FAILURES.json"))
        print(command.format_shell_line())
        return EXIT_OK
    return start_run(resolved, opened, workers)


def resolve_and_open(config: RunConfig, workers: int) -> tuple[ResolvedConfig, OpenedRun]:
    """Replace values set to auto by those of the existing run or of a measurement, and open the run.

    If a measurement is needed, the run is opened before it, so that an error is found at once, and again after it:
    another command may have used the run directory meanwhile.

    Raises:
        UsageError: the configuration is invalid.
        MeasurementError: the measurement failed.
    """
    resolved = resolve_without_measuring(config, workers)
    if resolved is not None:
        return resolved, open_run(resolved.config, workers)
    unmeasured = make_unmeasured_config(config)
    opened = open_run(unmeasured, workers)
    if config.launch.dry_run:
        return ResolvedConfig(unmeasured), opened
    resolved = measure_auto_values(config, workers)
    return resolved, open_run(resolved.config, workers)


def measure_auto_values(config: RunConfig, workers: int) -> ResolvedConfig:
    """Replace values set to auto by those of a cached or a new measurement.

    Raises:
        MeasurementError: the measurement failed.
    """
    from launcher.tune import driver as tuning

    print_stderr(f"note: {auto_batch.lookup_note(config)}")
    measurement = tuning.measure(auto_batch.tuning_config(config), workers, use_cache=True)
    return resolve_from_measurement(config, measurement, run_path(config, None, 1))


def start_run(resolved: ResolvedConfig, opened: OpenedRun, workers: int) -> int:
    """Create and lock the run directory, and run torchrun there; return the exit status."""
    for line in opened.training_plan.advice:
        print_stderr(f"note: {line}")
    run_dir = opened.run_dir
    created_dir = run_dir.create()
    lock = run_dir.lock()
    try:
        write_run_files(opened, resolved.profile)
        with tempfile.TemporaryDirectory(prefix="launcher-") as private:
            status = TorchrunJob(opened, workers, Path(private), resolved).run()
        if status == EXIT_USAGE and created_dir is not None:
            run_dir.discard(created_dir)  # also if only the workers found the error
        return status
    finally:
        lock.release()


class TorchrunJob:
    """A torchrun process: starts it, watches it, forwards stop requests and reports how it ended."""

    def __init__(self, opened: OpenedRun, workers: int, private: Path, resolved: ResolvedConfig) -> None:
        self._run_dir: RunDirectory = opened.run_dir
        self._config = opened.config
        self._first_generation = opened.run_dir.read_generation() + 1
        exit_codes = private / "exit-codes.jsonl"
        self._failed_starts = FailedStarts(opened.run_dir, self._first_generation, exit_codes)
        job_spec = JobSpec.from_opened(opened, under_driver=True, why=resolved.why, profile=resolved.profile)
        job_spec = replace(job_spec, first_generation=self._first_generation)
        self._handover = write_memfd(job_spec.to_json())
        path = Path(f"/proc/{os.getpid()}/fd/{self._handover}")
        self._command = make_torchrun_command(opened.config, workers, path, exit_codes)
        self._signal_count = self._last_generation = 0
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
            generation = self._run_dir.read_generation()  # one higher at each start of the workers
            self._failed_starts.observe(generation)
            if agent.returncode == 0:
                return self._finish_successfully()
            last_saved = max(self._first_generation, self._run_dir.read_saved_generation())
            failure = failures.first_failure(self._run_dir.logs, last_saved)
            restarted = generation > max(self._last_generation, self._first_generation)
            self._last_generation = generation
            ended_by = self._record_failure(generation - 1) if restarted else None
            is_fatal = (failure is not None and failure.is_fatal) or self._failed_starts.is_repeated(generation)
            if agent.returncode is not None or is_fatal or generation - last_saved > self._config.elastic.max_restarts:
                kill_process_tree(agent)
                self._record_failure(generation)
                return self._report_failure(failure)
            if restarted:
                why = self._failed_starts.last_exit if ended_by is None else ended_by.summary()
                print_stderr(f"restart {generation - self._first_generation}: {why or 'a worker received SIGTERM'}")
            if self._signal_count:
                self._forward_stop(agent.pid)

    def _record_failure(self, generation: int) -> failures.RankFailure | None:
        """Return the failure that ended a generation, and log it as an event if rank 0 did not.

        Called only while no worker writes events: the workers of that generation are dead, and the next rank 0 is still
        importing torch.
        """
        failure = failures.root_cause(self._run_dir.logs, generation) if generation >= self._first_generation else None
        if failure is not None and not failures.is_logged(self._run_dir.events, failure):
            with suppress(OSError):  # e.g. disk full: the message on screen and the record in logs/ remain
                append_line(self._run_dir.events, failure.to_event())
        return failure

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP request save and stop from the workers; a second Ctrl-C aborts."""
        if not self._signal_count:
            self._signal_count = 1
            name = signal.Signals(signum).name
            self._run_dir.request_stop(name)
            more = " (press Ctrl-C again to end at once)" if signum == signal.SIGINT else ""
            print_stderr(f"{name}: saving at the next update, then stopping{more}")
        elif signum == signal.SIGINT:
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
            run_option = f"run.name={name}" if path == RUNS_DIR / str(name) else f"run.dir={path}"
            print_stderr(f"stopped after saving: the same command with {run_option} continues from there")
        self._run_dir.clear_stop()
        return EXIT_OK

    def _report_failure(self, failure: failures.RankFailure | None) -> int:
        """Print the error. If no rank recorded the cause, a worker was killed or left: describe how it ended."""
        is_consequence = failure is None or (failure.status != EXIT_USAGE and failures.is_peer_failure(failure.message))
        line = "" if failure is None else failure.summary()
        if is_consequence:
            line = self._failed_starts.last_exit or f"torchrun ended ({line or f'logs: {self._run_dir.logs}'})"
        if self._failed_starts.repeated:
            print_stderr("not started again: the workers failed twice in the same way before any update was made")
        print_stderr(f"error: {line}")
        if failure is not None and self._config.debug:
            print_stderr(failure.traceback, multiline=True)
        return EXIT_USAGE if failure is not None and failure.status == EXIT_USAGE else EXIT_FAILED
