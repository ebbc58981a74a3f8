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
from dataclasses import dataclass, replace
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from launcher.config.keys import to_mapping
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_RESTART, EXIT_USAGE, UsageError
from launcher.goodput import auto_batch
from launcher.goodput.auto_batch import MeasurementError, ResolvedConfig
from launcher.launch import log_files
from launcher.launch.agent_memory import AgentMemory, load_agent_memory, save_agent_memory
from launcher.run_dir import failures
from launcher.run_dir.lock import RunDirLock
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.claim import read_claim
from launcher.system.processes import die_with_parent
from launcher.system.stderr import print_stderr
from launcher.topology import Topology
from launcher.train.job_spec import JobSpec

if TYPE_CHECKING:
    from torch.distributed import Store

    from launcher.distributed.stop_requests import StopRequests
    from launcher.distributed.watchdog import Watchdog

__all__ = ["main", "main_handover"]


@dataclass(frozen=True)
class RunDirClaim:
    """Rank 0's claim on the run folder: the lock, unless the driver holds it, and the topmost created folder."""

    job_spec: JobSpec
    lock: RunDirLock | None = None
    made: Path | None = None

    def discard(self) -> None:
        """Remove the folders that were created, because the configuration is invalid."""
        if self.made is not None:
            self.job_spec.run_dir.discard(self.made)


@dataclass(frozen=True)
class MeasurementRequest:
    """A measurement by all ranks that rank 0 needs before it can open the run. `token` is unique."""

    config: RunConfig
    token: str

    def to_json(self) -> str:
        return json.dumps({"question": to_mapping(self.config), "token": self.token})


#: Makes rank 0's decision from what earlier starts decided and from the measurement, if any.
DecideFn = Callable[[AgentMemory | None, Mapping[str, Any] | None], RunDirClaim | MeasurementRequest]


def main(args: Sequence[str], topology: Topology) -> int:
    """Entry point under the user's own torchrun: rank 0 composes the configuration from the command line."""
    return run_rank(topology, lambda known, found: compose_on_rank0(args, topology, known, found), loopback=False)


def main_handover(path: str, topology: Topology) -> int:
    """Entry point under the driver's agent: the driver has written the composed job to a private file."""
    return run_rank(
        topology, lambda *_: RunDirClaim(JobSpec.from_json(Path(path).read_text()).start_generation()), loopback=True
    )


def compose_on_rank0(
    args: Sequence[str], topology: Topology, recalled: AgentMemory | None, measured: Mapping[str, Any] | None = None
) -> RunDirClaim | MeasurementRequest:
    """Compose the job on rank 0 under the user's own torchrun; a restart continues in the `recalled` folder.

    Returns a MeasurementRequest if an open value, e.g. batch.per_device=auto, has not been `measured` yet.

    Raises:
        UsageError: the configuration is invalid; nothing was created.
    """
    from launcher.config.compose import resolve
    from launcher.run_dir.open_run import open_run, write_run_files

    resolution = resolve(args)
    known = recalled or recall_requeued_job(resolution.config, topology)
    folder = None if known is None else known.folder
    asked = resolve_auto_values(resolution.config, topology, folder, measured)
    if isinstance(asked, MeasurementRequest):
        return asked
    found = open_run(asked.config, topology.world, existing=folder, run_id=topology.run_id, nodes=topology.nodes)
    job_spec = JobSpec.from_opened(found, loopback=False, why=asked.why, profile=asked.profile)
    if known is not None:
        job_spec = replace(job_spec, restarted=True, previous_checkpoint=known.newest)
    if found.is_complete:
        return RunDirClaim(replace(job_spec, summary=found.format_summary()))
    if known is None:
        for line in (*resolution.notes, *found.training_plan.advice, *describe_restart_limit(found.config, topology)):
            print_stderr(f"note: {line}", multiline=True)
    made = found.run_dir.create()
    lock = found.run_dir.lock(torchrun=os.getppid())
    write_run_files(found, asked.profile)
    save_agent_memory(AgentMemory(found.run_dir.path, job_spec.previous_checkpoint))
    return RunDirClaim(job_spec.start_generation(), lock, made)


def resolve_auto_values(
    config: RunConfig, topology: Topology, folder: Path | None, measured: Mapping[str, Any] | None
) -> ResolvedConfig | MeasurementRequest:
    """Resolve open values from the run folder or from `measured`; else return the MeasurementRequest.

    Raises:
        UsageError: the configuration is invalid, whatever a measurement would yield.
    """
    from launcher.launch.resolve_auto import resolve_from_measurement, resolve_without_measuring
    from launcher.run_dir.open_run import run_path

    if measured is not None:
        return resolve_from_measurement(config, measured, folder or run_path(config, topology.run_id, topology.nodes))
    found = resolve_without_measuring(
        config, topology.world, existing=folder, run_id=topology.run_id, nodes=topology.nodes
    )
    if found is not None:
        return found
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


def run_rank(topology: Topology, assign: DecideFn, *, loopback: bool) -> int:
    """Run a rank from start to end; return its exit status.

    Rank 0 decides before it connects to the other ranks, so that an invalid configuration is reported immediately. If
    its node may have joined a job that other nodes already know, it first asks them.

    Raises:
        UsageError: on rank 0 only, the configuration is invalid.
    """
    die_with_parent()
    stop_requests = install_stop_requests()
    try:
        claim, text, store = agree_on_job(topology, assign, loopback)
    except MeasurementError as error:
        return report_measurement_error(error, topology)
    if not text:
        return EXIT_USAGE  # rank 0 reports the error
    from launcher.train import session

    job_spec = claim.job_spec if claim else JobSpec.from_json(text)
    if job_spec.summary is not None:
        return report_complete(job_spec.summary, topology)
    topology = topology.with_generation(job_spec.generation)
    screen = log_files.redirect_output(
        job_spec.run_dir.get_log_path(*topology.rank_and_generation), topology.rank, debug=job_spec.config.debug
    )
    watchdog = start_watchdog(job_spec, topology, screen)
    try:
        return session.run(job_spec, topology, store, stop_requests, watchdog)
    except Exception as error:
        if watchdog is not None:
            watchdog.stop()
        status = handle_failure(job_spec, topology, error, screen)
        if claim is not None and status == EXIT_USAGE:
            claim.discard()
        if status == EXIT_RESTART and not active_children():
            exit_immediately(status)
        return status
    finally:
        stop_requests.ignore_late_signals()
        if claim is not None and claim.lock is not None:
            claim.lock.release()


def agree_on_job(topology: Topology, assign: DecideFn, loopback: bool) -> tuple[RunDirClaim | None, str, Store]:
    """Agree on the job: return rank 0's claim (None elsewhere), the job as JSON, and a sub-store for later use.

    Raises:
        UsageError: on rank 0 only, the configuration is invalid; the other ranks receive empty text.
        MeasurementError: on every rank, the measurement failed.
    """
    own = None if loopback else load_agent_memory()
    knows = own is not None or loopback or topology.nodes == 1
    word = assign(own, None) if topology.rank == 0 and knows else None
    from launcher.distributed import rendezvous

    timeout_s = config_of(word).launch.timeout_s if word else 600.0
    store = rendezvous.connect_store(topology, loopback=loopback, timeout_s=timeout_s)
    said, store = rendezvous.gather_to_rank0(store, topology, own.to_json() if own else "", timeout_s)
    known = own or next((AgentMemory.from_json(text) for text in said if text), None)
    if topology.rank == 0 and word is None:
        word = decide_or_abort(assign, known, None, store)
    text = rendezvous.broadcast_text(store, serialize_decision(word))
    if text and "question" in json.loads(text):
        from launcher.tune.processes.sidecar import measure_in_sidecars

        found = measure_in_sidecars(json.loads(text), topology, store)
        store = rendezvous.sub_store(store, "answered")
        word = decide_or_abort(assign, known, found, store) if topology.rank == 0 else None
        text = rendezvous.broadcast_text(store, serialize_decision(word))
    if text and not loopback and known is None and topology.rank and topology.local_rank == 0:
        recalled = JobSpec.from_json(text)
        save_agent_memory(
            AgentMemory(recalled.run_dir.path, recalled.previous_checkpoint)
        )  # rank 0 may be on another node at the next start
    return word if isinstance(word, RunDirClaim) else None, text, store


def config_of(word: RunDirClaim | MeasurementRequest) -> RunConfig:
    return word.job_spec.config if isinstance(word, RunDirClaim) else word.config


def serialize_decision(word: RunDirClaim | MeasurementRequest | None) -> str | None:
    """The text that rank 0 sends to the other ranks."""
    return None if word is None else word.to_json() if isinstance(word, MeasurementRequest) else word.job_spec.to_json()


def decide_or_abort(
    assign: DecideFn, known: AgentMemory | None, found: Mapping[str, Any] | None, store: Store
) -> RunDirClaim | MeasurementRequest:
    """Make rank 0's decision while the other ranks wait for it; on an error, let them exit.

    Raises:
        UsageError: the configuration is invalid.
    """
    from launcher.distributed import rendezvous

    try:
        return assign(known, found)
    except BaseException:
        rendezvous.broadcast_text(store, "")
        raise


def exit_immediately(status: int) -> NoReturn:
    """Exit without tearing torch down, which takes a second: the agent waits for this process before a restart."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_watchdog(job_spec: JobSpec, topology: Topology, screen: TextIO) -> Watchdog | None:
    from launcher.distributed.hang_detection import HangTimeouts
    from launcher.distributed.watchdog import Watchdog

    elastic, compiles = job_spec.config.elastic, job_spec.config.train.compile
    limits = HangTimeouts(elastic.hang_timeout_s, elastic.first_timeout_s)
    return Watchdog.start(
        job_spec.run_dir, topology, limits, compiles=compiles, terminal=None if job_spec.loopback else screen
    )


def install_stop_requests() -> StopRequests:
    from launcher.distributed.stop_requests import StopRequests

    stop_requests = StopRequests()
    stop_requests.install()
    return stop_requests


def report_measurement_error(error: MeasurementError, topology: Topology) -> int:
    if topology.rank == 0:
        print_stderr(f"error: {error}", multiline=True)
    return EXIT_FAILED


def report_complete(summary: str, topology: Topology) -> int:
    if topology.rank == 0:
        print(summary)
    return EXIT_OK


def handle_failure(job_spec: JobSpec, topology: Topology, error: Exception, screen: TextIO) -> int:
    """Record the failure for the driver to report; under the user's own torchrun, one rank prints it here."""
    from launcher.train.loop import TrainingFailed

    final = isinstance(error, TrainingFailed)
    log = job_spec.run_dir.get_log_path(*topology.rank_and_generation)
    found = failures.write_failure(job_spec.run_dir.logs, *topology.rank_and_generation, error, log, final=final)
    logging.getLogger(__name__).error("%s", found.traceback)
    if failures.is_peer_failure(found.message) and (job_spec.loopback or topology.restarts_left > 0):
        return EXIT_RESTART
    if not job_spec.loopback:
        if failures.should_report(job_spec.run_dir.logs, found):
            print(f"error: {found.summary()}", file=screen, flush=True)
            log_failure_event(job_spec.run_dir, found)
        failures.record_for_torchelastic(error)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def log_failure_event(run_dir: RunDirectory, found: failures.RankFailure) -> None:
    """Log the failure as an event if rank 0, which writes the events, did not."""
    from launcher.telemetry.sinks.jsonl import append_line_concurrently

    with suppress(OSError):
        if not failures.is_peer_failure(found.message) and not failures.is_logged(run_dir.events, found):
            append_line_concurrently(run_dir.events, found.to_event())
