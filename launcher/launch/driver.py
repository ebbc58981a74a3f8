"""The driver: checks a run, starts torchrun for it, forwards signals, and ends when it ends. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.distributed.commands import make_torchrun_command
from launcher.distributed.machine_limits import check_machine
from launcher.distributed.starter import make_starter_env
from launcher.distributed.worker_env import resolve_num_workers
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from launcher.goodput import auto_batch
from launcher.goodput.auto_batch import MeasurementError, ResolvedConfig, report_unmeasured
from launcher.launch.job_stop import AgentWorkers, JobStop
from launcher.launch.resolve_auto import make_unmeasured_config, resolve_from_measurement, resolve_without_measuring
from launcher.launch.waiting_agent import WaitingAgent
from launcher.run_dir import failures
from launcher.run_dir.failed_starts import FailedStarts
from launcher.run_dir.open_run import OpenedRun, open_run, run_path, write_run_files
from launcher.run_dir.run_directory import RUNS_DIR, RunDirectory
from launcher.system.jsonl import JsonlReader
from launcher.system.processes import MemoryFile, kill_process_tree
from launcher.system.signal_handlers import forward_signals_to
from launcher.system.stderr import print_stderr
from launcher.telemetry.sinks.jsonl import append_line
from launcher.train.job_spec import JobSpec

__all__ = ["launch_job"]

AGENT_POLL_S = 0.05


def launch_job(config: RunConfig, waiting: WaitingAgent | None = None) -> int:
    """Run one job from start to end, with the agent that waits for one, if any; return its exit status.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
    """
    workers = resolve_num_workers(config)
    if not config.launch.dry_run:
        check_machine(workers, config.data.num_workers)
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
    return start_run(resolved, opened, workers, waiting)


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
    try:
        measurement = tuning.measure(auto_batch.tuning_config(config), workers, use_cache=True)
    except KeyboardInterrupt:  # SIGTERM or Ctrl-C
        print_stderr("stopped while batch sizes were measured: no run was begun, and the same command measures again")
        raise
    return resolve_from_measurement(config, measurement, run_path(config, None, 1))


def start_run(resolved: ResolvedConfig, opened: OpenedRun, workers: int, waiting: WaitingAgent | None = None) -> int:
    """Create and lock the run directory, and run torchrun there; return the exit status."""
    for line in opened.training_plan.advice:
        print_stderr(f"note: {line}")
    run_dir = opened.run_dir
    created_dir = run_dir.create()
    lock = run_dir.lock()
    try:
        write_run_files(opened, resolved.profile)
        status = TorchrunJob(opened, workers, resolved).run(waiting)
        if status == EXIT_USAGE and created_dir is not None:
            run_dir.discard(created_dir)  # also if only the workers found the error
        return status
    finally:
        lock.release()


class TorchrunJob:
    """A torchrun process: starts it, watches it, forwards stop requests and reports how it ended."""

    def __init__(self, opened: OpenedRun, workers: int, resolved: ResolvedConfig) -> None:
        self._run_dir: RunDirectory = opened.run_dir
        self._config = opened.config
        self._first_generation = opened.run_dir.read_generation() + 1
        self._unwritten, self._exit_codes = MemoryFile(), MemoryFile()
        self._failed_starts = FailedStarts(opened.run_dir, self._first_generation, self._exit_codes.path)
        job_spec = JobSpec.from_opened(opened, under_driver=True, why=resolved.why, profile=resolved.profile)
        job_spec = replace(
            job_spec, first_generation=self._first_generation, unwritten_failures=str(self._unwritten.path)
        )
        self._handover = MemoryFile(job_spec.to_json())
        self._command = make_torchrun_command(opened.config, workers, self._handover.path, self._exit_codes.path)
        self._last_generation = 0
        self._started = time.time()
        self._stop = JobStop(opened.run_dir, opened.config.launch.grace_s)

    def run(self, waiting: WaitingAgent | None = None) -> int:
        with forward_signals_to(self._stop.on_signal):
            agent = None if waiting is None else waiting.hand_over(self._command)
            if agent is None:
                env = os.environ | self._command.env | make_starter_env()
                agent = subprocess.Popen(self._command.argv, env=env, start_new_session=True)
            workers = AgentWorkers(agent.pid)
            try:
                return self._wait_for_agent(agent, workers)
            finally:
                workers.refresh()
                kill_process_tree(agent)
                workers.end_leftovers()
                for file in (self._handover, self._unwritten, self._exit_codes):
                    file.close()

    def _wait_for_agent(self, agent: subprocess.Popen[bytes], workers: AgentWorkers) -> int:
        """Wait until the agent ends, or until restarting the workers is pointless; return the exit status."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(AGENT_POLL_S)
            if self._stop.is_aborted:
                return EXIT_INTERRUPTED
            workers.refresh()
            generation = self._count_generation()
            self._failed_starts.observe(generation)
            if agent.returncode == 0:
                return self._finish_successfully()
            last_saved = max(self._first_generation, self._run_dir.read_saved_generation())
            failure = failures.first_failure(self._run_dir.logs, last_saved, self._unwritten.path)
            restarted = generation > max(self._last_generation, self._first_generation)
            self._last_generation = generation
            ended_by = self._record_failure(generation - 1) if restarted else None
            is_fatal = (failure is not None and failure.is_fatal) or self._failed_starts.is_repeated(generation)
            if agent.returncode is not None or is_fatal or generation - last_saved > self._config.elastic.max_restarts:
                kill_process_tree(agent)
                self._record_failure(generation)
                return self._report_failure(failure)
            if (status := self._end_if_stopping(workers, failure, restarted=restarted)) is not None:
                kill_process_tree(agent)
                return status
            if restarted:
                why = self._failed_starts.last_exit if ended_by is None else ended_by.summary()
                print_stderr(f"restart {generation - self._first_generation}: {why or 'a worker received SIGTERM'}")

    def _count_generation(self) -> int:
        """The current generation: one higher at each start of the workers.

        The workers count it in the run directory, which may be full; the agent's record of failed starts is in memory.
        """
        return max(self._run_dir.read_generation(), self._first_generation + self._failed_starts.count)

    def _end_if_stopping(
        self, workers: AgentWorkers, failure: failures.RankFailure | None, *, restarted: bool
    ) -> int | None:
        """Pass a requested stop on to the workers; return the exit status once the job has nothing more to wait for."""
        if restarted and (self._stop.signal_name or self._run_dir.stop_requested()):
            return self._finish_successfully() if self._stop.was_saved() else self._report_failure(failure)
        if not self._stop.signal_name:
            return None
        if self._stop.has_nothing_to_save(workers):
            print_stderr(f"stopped before training: the same command with {self._run_option} starts from there")
            self._run_dir.clear_stop()
            return EXIT_OK
        if self._stop.is_overdue and self._stop.was_saved():
            return self._finish_successfully()  # only the end of a worker's process took too long
        if self._stop.is_overdue:
            print_stderr(
                f"error: {self._stop.signal_name}: the workers were not done within "
                f"launch.grace_s={self._config.launch.grace_s:g} and were killed; "
                f"the same command with {self._run_option} continues from the newest checkpoint"
            )
            self._run_dir.clear_stop()
            return EXIT_FAILED
        self._stop.forward(workers)
        return None

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

    def _finish_successfully(self) -> int:
        if self._run_dir.read_done() is None:
            if not self._stopped_on_request():
                print_stderr(
                    f"error: the workers exited with code 0 before training ended (logs: {self._run_dir.logs})"
                )
                return EXIT_FAILED
            print_stderr(f"stopped after saving: the same command with {self._run_option} continues from there")
        self._run_dir.clear_stop()
        return EXIT_OK

    @property
    def _run_option(self) -> str:
        """What to type to continue this run."""
        name, path = self._config.run.name, self._run_dir.path
        return f"run.name={name}" if path == RUNS_DIR / str(name) else f"run.dir={path}"

    def _stopped_on_request(self) -> bool:
        """Whether the workers left because of a stop request, and not because the recipe ended its process."""
        stops = JsonlReader(self._run_dir.events, containing="preempt")
        is_logged = any(event.get("event") == "preempt" and event["time"] >= self._started for event in stops)
        return bool(self._stop.signal_name or self._run_dir.stop_requested() or is_logged)

    def _report_failure(self, failure: failures.RankFailure | None) -> int:
        """Print the error. If no rank recorded the cause, a worker was killed or left: describe how it ended."""
        repeated = self._failed_starts.repeated
        if repeated is not None:
            failure = failures.root_cause(self._run_dir.logs, repeated)
        is_consequence = failure is None or (failure.status != EXIT_USAGE and failures.is_peer_failure(failure.message))
        line = "" if failure is None else failure.summary()
        if is_consequence:
            line = self._failed_starts.last_exit or f"torchrun ended ({line or f'logs: {self._run_dir.logs}'})"
        if repeated is not None:
            print_stderr("not started again: the workers failed twice in the same way before any update was made")
        print_stderr(f"error: {line}")
        if failure is not None and self._config.debug:
            print_stderr(failure.traceback, multiline=True)
        return EXIT_USAGE if failure is not None and failure.status == EXIT_USAGE else EXIT_FAILED
