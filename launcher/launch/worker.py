"""One rank from start to end: resolve the job, connect to the other ranks, train, exit with the right status.

Under the driver, every rank reads the job that the driver has composed. Under the user's own torchrun, only rank 0
composes the configuration and opens the run directory; it sends the resolved configuration to the other ranks through
the store, so that they cannot disagree. If all ranks are on one node, rank 0 does so before importing torch, so that an
invalid configuration is reported immediately.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from launcher.config.keys import to_mapping
from launcher.config.schema import RunConfig
from launcher.distributed.cleanup_process import CleanupProcess
from launcher.distributed.machine_limits import check_host_name, ensure_open_files, estimate_open_files
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_RESTART, EXIT_USAGE, TrainingFailed, UsageError
from launcher.goodput import auto_batch
from launcher.goodput.auto_batch import MeasurementError, ResolvedConfig
from launcher.launch import log_files
from launcher.launch.agent_memory import AgentMemory, load_agent_memory, save_agent_memory
from launcher.launch.decision import Decision, MeasurementRequest, RunDirClaim
from launcher.run_dir import failures
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.claim import read_claim
from launcher.system.garbage_collection import paused_garbage_collection
from launcher.system.processes import die_with_parent
from launcher.system.stderr import print_stderr
from launcher.topology import Topology, get_master_address, get_master_port
from launcher.train.job_spec import JobSpec

if TYPE_CHECKING:
    from torch.distributed import Store

    from launcher.distributed.stop_requests import StopRequests
    from launcher.distributed.watchdog import Watchdog

__all__ = ["main", "main_handover"]


#: Makes rank 0's choice from what an earlier start under the same agent decided, and from a measurement, if any.
DecideFn = Callable[[AgentMemory | None, Mapping[str, Any] | None], RunDirClaim | MeasurementRequest]


def main(args: Sequence[str], topology: Topology) -> int:
    """Entry point under the user's own torchrun: rank 0 composes the configuration from the command line."""
    check_store_address(topology)
    return run_rank(
        topology,
        lambda recalled, measurement: compose_on_rank0(args, topology, recalled, measurement),
        under_driver=False,
    )


def check_store_address(topology: Topology) -> None:
    """
    Raises:
        UsageError: this node cannot resolve the host of the store; torch would try for ten minutes. Other nodes than
            rank 0's report it themselves.
    """
    try:
        check_host_name(get_master_address(), get_master_port())
    except UsageError as error:
        if topology.node and topology.local_rank == 0:
            print_stderr(f"error: {error}")
        raise


def main_handover(path: str, topology: Topology) -> int:
    """Entry point under the driver's agent: the driver has written the composed job to a private file."""
    return run_rank(
        topology,
        lambda *_: RunDirClaim(start_or_record(JobSpec.from_json(Path(path).read_text()), topology)),
        under_driver=True,
    )


def start_or_record(job_spec: JobSpec, topology: Topology) -> JobSpec:
    """Start a generation; the driver reports a failure, since nothing else could be written either.

    Raises:
        TrainingFailed: the run directory cannot be written, e.g. because the disk is full.
    """
    try:
        return job_spec.start_generation()
    except OSError as problem:
        error = TrainingFailed(f"{job_spec.run_dir.path} cannot be written: {problem.strerror or problem}")
        generation = (job_spec.first_generation or 1) + topology.restarts
        logs = job_spec.run_dir.logs
        log, unwritten = job_spec.run_dir.get_log_path(topology.rank, generation), job_spec.unwritten_failures
        failures.write_failure(logs, topology.rank, generation, error, log, final=True, unwritten=unwritten)
        raise error from problem


def compose_on_rank0(
    args: Sequence[str], topology: Topology, recalled: AgentMemory | None, measurement: Mapping[str, Any] | None = None
) -> RunDirClaim | MeasurementRequest:
    """Compose the job on rank 0 under the user's own torchrun; a restart continues in the `recalled` directory.

    Returns a MeasurementRequest if a value is set to auto, e.g. batch.per_device, and has not been measured yet.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
    """
    with paused_garbage_collection():
        from launcher.config.compose import resolve
        from launcher.run_dir.open_run import open_run, write_run_files

    resolution = resolve(args)
    ensure_open_files(estimate_open_files(topology.world, resolution.config.data.num_workers))
    recalled = recalled or recall_requeued_job(resolution.config, topology)
    existing = None if recalled is None else recalled.folder
    resolved = resolve_auto_values(resolution.config, topology, existing, measurement)
    if isinstance(resolved, MeasurementRequest):
        return resolved
    opened = open_run(resolved.config, topology.world, existing=existing, run_id=topology.run_id, nodes=topology.nodes)
    job_spec = JobSpec.from_opened(opened, under_driver=False, why=resolved.why, profile=resolved.profile)
    if recalled is not None:
        job_spec = replace(job_spec, restarted=True, previous_checkpoint=recalled.newest)
    if opened.is_complete:
        return RunDirClaim(replace(job_spec, summary=opened.format_summary()))
    if recalled is None:
        for line in (*resolution.notes, *opened.training_plan.advice, *describe_restart_limit(opened.config, topology)):
            print_stderr(f"note: {line}", multiline=True)
    created_dir = opened.run_dir.create()
    lock = opened.run_dir.lock(torchrun=os.getppid())
    write_run_files(opened, resolved.profile)
    save_agent_memory(AgentMemory(opened.run_dir.path, job_spec.previous_checkpoint))
    return RunDirClaim(job_spec.start_generation(), lock, created_dir)


def resolve_auto_values(
    config: RunConfig, topology: Topology, existing: Path | None, measurement: Mapping[str, Any] | None
) -> ResolvedConfig | MeasurementRequest:
    """Replace values set to auto by those of the existing run or of the measurement; else request the measurement.

    Raises:
        UsageError: the configuration is invalid, whatever a measurement would yield.
    """
    from launcher.launch import resolve_auto
    from launcher.run_dir.open_run import open_run, run_path

    run_id, nodes = topology.run_id, topology.nodes
    if measurement is not None:
        path = existing or run_path(config, run_id, nodes)
        return resolve_auto.resolve_from_measurement(config, measurement, path)
    resolved = resolve_auto.resolve_without_measuring(
        config, topology.world, existing=existing, run_id=run_id, nodes=nodes
    )
    if resolved is not None:
        return resolved
    unmeasured = resolve_auto.make_unmeasured_config(config)
    open_run(unmeasured, topology.world, existing=existing, run_id=run_id, nodes=nodes)  # finds all other errors
    print_stderr(f"note: {auto_batch.lookup_note(config)}", multiline=True)
    return MeasurementRequest(auto_batch.tuning_config(config), os.urandom(8).hex())


def recall_requeued_job(config: RunConfig, topology: Topology) -> AgentMemory | None:
    """The decision of an earlier start of the same Slurm job, whose script sets run.dir; None if there is none."""
    if not topology.requeued or config.run.dir is None:
        return None
    run_dir = RunDirectory(Path(config.run.dir))
    kept = read_claim(run_dir)
    if kept is None or kept["job"] != topology.slurm_job or not run_dir.run_yaml.exists():
        return None
    return AgentMemory(run_dir.path, kept["newest"])


def describe_restart_limit(config: RunConfig, topology: Topology) -> Iterator[str]:
    if topology.restarts_left <= 0:
        again = f"run.name={config.run.name} continues from its newest checkpoint"
        yield f"torchrun has no restarts left (--max-restarts): a dead worker ends the job; {again}"


def run_rank(topology: Topology, decide: DecideFn, *, under_driver: bool) -> int:
    """Run a rank from start to end; return its exit status.

    Rank 0 decides before it connects to the other ranks, so that an invalid configuration is reported immediately. If
    its node may have joined a job that other nodes already know, it first asks them.

    Raises:
        UsageError: on rank 0 only, the configuration is invalid.
    """
    die_with_parent()
    cleanup = CleanupProcess.start()
    stop_requests = install_stop_requests(cleanup)
    try:
        agreed = agree_on_job(topology, decide, under_driver)
    except (MeasurementError, TrainingFailed) as error:
        return report_early_failure(error, topology)
    job_spec, claim = agreed.job_spec, agreed.claim
    if job_spec is None:
        return EXIT_USAGE  # rank 0 reports the error
    from launcher.train import session

    if job_spec.summary is not None:
        return report_complete(job_spec.summary, topology)
    topology = topology.with_generation(job_spec.generation)
    log = job_spec.run_dir.get_log_path(*topology.rank_and_generation)
    terminal = log_files.redirect_output(log, topology.rank, debug=job_spec.config.debug)
    watchdog = start_watchdog(job_spec, topology, terminal, cleanup)
    try:
        ensure_open_files(estimate_open_files(topology.world, job_spec.config.data.num_workers))
        return session.run_session(job_spec, topology, agreed.store, stop_requests, watchdog)
    except BaseException as error:  # the recipe may also have called sys.exit
        if watchdog is not None:
            watchdog.stop()
        status = handle_failure(job_spec, topology, error, terminal)
        if claim is not None and status == EXIT_USAGE:
            claim.discard()
        if status == EXIT_RESTART and not active_children():
            exit_immediately(status)
        return status
    finally:
        stop_requests.ignore_late_signals()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise where a loader process is killed at the end
        if claim is not None:
            claim.release()


@dataclass(frozen=True)
class AgreedJob:
    """The job that all ranks agree on, None if rank 0 has failed; rank 0's claim; a sub-store for later use."""

    job_spec: JobSpec | None
    claim: RunDirClaim | None
    store: Store


def agree_on_job(topology: Topology, decide: DecideFn, under_driver: bool) -> AgreedJob:
    """Agree on the job, measuring first what rank 0 requests.

    Raises:
        UsageError: on rank 0 only, the configuration is invalid; the other ranks receive no job.
        MeasurementError: on every rank, the measurement failed.
    """
    own_memory = None if under_driver else load_agent_memory()
    # rank 0 of a node that joins a running job must first ask the other nodes which run it is
    decides_alone = own_memory is not None or under_driver or topology.nodes == 1
    choice = decide(own_memory, None) if topology.rank == 0 and decides_alone else None
    with paused_garbage_collection():  # before the ranks wait for each other, so that their imports overlap
        import launcher.train.session  # noqa: F401
        from launcher.distributed import rendezvous

    timeout_s = 600.0 if choice is None else get_config(choice).launch.timeout_s
    store = rendezvous.connect_store(topology, loopback=under_driver, timeout_s=timeout_s)
    memories, store = rendezvous.gather_to_rank0(store, topology, own_memory.to_json() if own_memory else "", timeout_s)
    recalled = own_memory or next((AgentMemory.from_json(text) for text in memories if text), None)
    if topology.rank == 0 and choice is None:
        choice = decide_or_abort(decide, recalled, None, store)
    decision = broadcast_decision(store, choice)
    if decision.measurement is not None:
        from launcher.tune.processes.sidecar import measure_in_sidecars

        request = decision.measurement
        measurement = measure_in_sidecars(to_mapping(request.config), request.token, topology, store)
        store = rendezvous.make_sub_store(store, "answered")
        choice = decide_or_abort(decide, recalled, measurement, store) if topology.rank == 0 else None
        decision = broadcast_decision(store, choice)
    claim = choice if isinstance(choice, RunDirClaim) else None
    job_spec = decision.job_spec if claim is None else claim.job_spec
    if job_spec is not None and not under_driver and recalled is None and topology.rank and topology.local_rank == 0:
        # rank 0 may be on another node at the next start
        save_agent_memory(AgentMemory(job_spec.run_dir.path, job_spec.previous_checkpoint))
    return AgreedJob(job_spec, claim, store)


def get_config(choice: RunDirClaim | MeasurementRequest) -> RunConfig:
    return choice.job_spec.config if isinstance(choice, RunDirClaim) else choice.config


def broadcast_decision(store: Store, choice: RunDirClaim | MeasurementRequest | None) -> Decision:
    """Broadcast rank 0's choice to all ranks; the other ranks pass None."""
    from launcher.distributed import rendezvous

    text = None if choice is None else Decision.from_rank0(choice).to_json()
    return Decision.from_json(rendezvous.broadcast_text(store, text))


def decide_or_abort(
    decide: DecideFn, recalled: AgentMemory | None, measurement: Mapping[str, Any] | None, store: Store
) -> RunDirClaim | MeasurementRequest:
    """Make rank 0's choice while the other ranks wait for it; on an error, let them exit.

    Raises:
        UsageError: the configuration is invalid.
    """
    from launcher.distributed import rendezvous

    try:
        return decide(recalled, measurement)
    except BaseException:
        rendezvous.broadcast_text(store, Decision().to_json())
        raise


def exit_immediately(status: int) -> NoReturn:
    """Exit without tearing torch down, which takes a second: the agent waits for this process before a restart."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_watchdog(
    job_spec: JobSpec, topology: Topology, terminal: TextIO, cleanup: CleanupProcess | None
) -> Watchdog | None:
    from launcher.distributed.hang_detection import HangTimeouts
    from launcher.distributed.watchdog import Watchdog, locate_shared_heartbeats

    if cleanup is not None:
        cleanup.remove_at_end(locate_shared_heartbeats(job_spec.run_dir.path, topology))
    elastic, compiles = job_spec.config.elastic, job_spec.config.train.compile
    limits = HangTimeouts(elastic.hang_timeout_s, elastic.first_timeout_s)
    return Watchdog.start(
        job_spec.run_dir, topology, limits, compiles=compiles, terminal=None if job_spec.under_driver else terminal
    )


def install_stop_requests(cleanup: CleanupProcess | None) -> StopRequests:
    from launcher.distributed.stop_requests import StopRequests

    stop_requests = StopRequests(cleanup)
    stop_requests.install()
    return stop_requests


def report_early_failure(error: MeasurementError | TrainingFailed, topology: Topology) -> int:
    """Print an error that occurred before training on rank 0; the driver prints what was recorded for it."""
    if topology.rank == 0 and isinstance(error, MeasurementError):
        print_stderr(f"error: {error}", multiline=True)
    return EXIT_FAILED


def report_complete(summary: str, topology: Topology) -> int:
    if topology.rank == 0:
        print(summary)
    return EXIT_OK


def handle_failure(job_spec: JobSpec, topology: Topology, error: BaseException, terminal: TextIO) -> int:
    """Record the failure for the driver to report; under the user's own torchrun, one rank prints it here."""
    final = isinstance(error, TrainingFailed)
    log = job_spec.run_dir.get_log_path(*topology.rank_and_generation)
    failure = failures.write_failure(
        job_spec.run_dir.logs,
        *topology.rank_and_generation,
        error,
        log,
        final=final,
        unwritten=job_spec.unwritten_failures,
    )
    logging.getLogger(__name__).error("%s", failure.traceback)
    if failures.is_peer_failure(failure.message) and (job_spec.under_driver or topology.restarts_left > 0):
        return EXIT_RESTART
    if not job_spec.under_driver:
        if failures.should_report(job_spec.run_dir.logs, failure):
            print(f"error: {describe_for_torchrun(failure)}", file=terminal, flush=True)
            log_failure_event(job_spec.run_dir, failure)
        failures.record_for_torchelastic(error)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def describe_for_torchrun(failure: failures.RankFailure) -> str:
    """The error as one line; torchrun itself shows how a worker ended that recorded no failure."""
    if not failures.is_peer_failure(failure.message):
        return failure.summary()
    return (
        f"another worker ended without an error message, and rank {failure.rank} lost its connection to it: torchrun "
        f"names its rank and exit code below (log: {failure.log})"
    )


def log_failure_event(run_dir: RunDirectory, failure: failures.RankFailure) -> None:
    """Log the failure as an event if rank 0, which writes the events, did not."""
    from launcher.telemetry.sinks.jsonl import append_line_concurrently

    with suppress(OSError):
        if not failures.is_peer_failure(failure.message) and not failures.is_logged(run_dir.events, failure):
            append_line_concurrently(run_dir.events, failure.to_event())
