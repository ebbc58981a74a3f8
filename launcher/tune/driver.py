"""`tune` from the command line: the driver starts the workers in a temporary folder, which is removed afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher import recipe as recipes
from launcher.config.keys import from_mapping, to_mapping
from launcher.config.schema import RunConfig
from launcher.distributed.cleanup_process import CleanupProcess
from launcher.distributed.commands import make_probe_command
from launcher.distributed.leftovers import JobMark, end_leftovers
from launcher.distributed.machine_limits import check_machine
from launcher.distributed.starter import make_starter_env
from launcher.distributed.worker_env import resolve_num_workers
from launcher.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError
from launcher.goodput.auto_batch import MeasurementError, report_unmeasured, with_placeholder_batch
from launcher.goodput.measured_noise import find_noise_scale
from launcher.run_dir import failures
from launcher.system.atomic_files import atomic_write_text, make_durable_dir
from launcher.system.formatting import encodable
from launcher.system.processes import MemoryFile, die_with_parent, kill_process_tree
from launcher.system.signal_handlers import sigterm_as_keyboard_interrupt
from launcher.system.stderr import print_stderr
from launcher.topology import Topology
from launcher.tune.report.document import explain_recommendation
from launcher.tune.report.goodput_column import goodput_values

__all__ = [
    "main",
    "measure",
    "print_result",
    "tune_batch_size",
    "validate_tune_request",
    "with_goodput",
    "write_outputs",
]


def tune_batch_size(config: RunConfig) -> int:
    """Measure with `launch.workers` processes on this machine and print the result.

    Raises:
        UsageError: the request is wrong.
    """
    workers, config = validate_tune_request(config)
    if config.launch.dry_run:
        print(make_probe_command(config, workers, Path("HANDOVER.json")).format_shell_line())
        return EXIT_OK
    try:
        print_result(measure(config, workers), config)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except MeasurementError as error:
        return report_unmeasured(error, config)
    return EXIT_OK


def validate_tune_request(config: RunConfig) -> tuple[int, RunConfig]:
    """Validate the request; return the number of workers and the configuration to measure.

    Raises:
        UsageError: the request is wrong; nothing was started.
    """
    from launcher.plan.training_plan import make_training_plan

    workers, config = resolve_num_workers(config), with_placeholder_batch(config)
    find_noise_scale(config)  # rejects a wrong plan.noise before measuring
    make_training_plan(config, recipes.get_dataset_sizes(recipes.build_recipe(config.recipe)), workers)
    return workers, config


def measure(config: RunConfig, workers: int, *, use_cache: bool = False) -> dict[str, Any]:
    """Measure with workers on this machine and return the document, or a cached one if allowed and there is one.

    Raises:
        UsageError: the request is wrong.
        MeasurementError: a worker failed.
        KeyboardInterrupt: SIGTERM or Ctrl-C was received; workers and temporary files have been removed.
    """
    check_machine(workers, config.data.num_workers)
    outcome = MemoryFile()
    handover = MemoryFile(
        json.dumps({"config": to_mapping(config), "outcome": str(outcome.path), "use_cache": use_cache})
    )
    command = make_probe_command(config, workers, handover.path)
    with sigterm_as_keyboard_interrupt():
        env = os.environ | command.env | make_starter_env()
        fork_server = subprocess.Popen(command.argv, env=env, stdout=2, start_new_session=True)
        mark = JobMark.of_process(fork_server.pid)
        try:
            fork_server.wait()
            return _read_outcome(outcome.path, fork_server.returncode)
        finally:
            kill_process_tree(fork_server)
            end_leftovers([mark] if mark is not None else [])
            for file in (handover, outcome):
                file.close()


def _read_outcome(file: Path, status: int) -> dict[str, Any]:
    """Read the result that the fork server left.

    Raises:
        UsageError, MeasurementError: as `measure`.
    """
    text = file.read_text()
    if not text:
        raise MeasurementError(failures.describe_exit("the process that starts the measuring ranks", status))
    outcome = json.loads(text)
    if "usage_error" in outcome:
        raise UsageError(outcome["usage_error"])
    if "measurement_error" in outcome:
        raise MeasurementError(outcome["measurement_error"], outcome["trace"])
    document: dict[str, Any] = outcome["document"]
    return document


def print_result(document: Mapping[str, Any], config: RunConfig) -> None:
    """Print the result to stdout, as a table or one JSON document, and write files if `tune.out` is set."""
    for note in document["said"]:
        print_stderr(f"note: {note}")
    document = with_goodput(document, config)
    from launcher.tune.report.html import render_tune_page
    from launcher.tune.report.text import format_tune_text

    if config.format == "json":
        print(json.dumps(document))
    else:
        print(encodable(format_tune_text(document), sys.stdout), end="")
    if config.tune.out is not None:
        folder = Path(config.tune.out)
        write_outputs(
            folder, {"tune.json": json.dumps(document, indent=1) + "\n", "tune.html": render_tune_page(document)}
        )
        print_stderr(f"written: {folder / 'tune.json'}, {folder / 'tune.html'}")


def with_goodput(document: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The document with the goodput of its sizes, where the noise scale is known, and what it means for progress."""
    goodput = goodput_values(document, find_noise_scale(config), config.lr.base_batch)
    if document["recommended"] is None:
        return {**document, "goodput": goodput}
    return {**document, "goodput": goodput, "why": explain_recommendation(document, goodput, config.lr.base_batch)}


def write_outputs(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into `folder`, which is tune.out or below it.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        make_durable_dir(folder)
        for name, text in texts.items():
            atomic_write_text(folder / name, text)
    except OSError as problem:
        raise UsageError(f"tune.out={folder} cannot be written ({problem.strerror}): type another folder") from problem


# --- a worker -------------------------------------------------------------------------------------------------------


def main(compose: Callable[[], RunConfig], topology: Topology) -> int:
    """Run one rank under the user's own torchrun: rank 0 composes the configuration and prints the result."""
    from launcher.distributed import rendezvous

    die_with_parent()
    CleanupProcess.start()
    composed = compose() if topology.rank == 0 else None
    timeout_s = composed.launch.timeout_s if composed else 600.0
    store = rendezvous.connect_store(topology, loopback=False, timeout_s=timeout_s)
    _, store = rendezvous.gather_to_rank0(store, topology, "", timeout_s)
    text = None if composed is None else json.dumps(to_mapping(composed))
    text = rendezvous.broadcast_text(store, text)
    config = with_placeholder_batch(composed or from_mapping(json.loads(text)))
    from launcher.tune.session import measure_on_rank

    with redirect_stdout_to_stderr():
        document = measure_on_rank(config, topology.with_generation(1), store)
    if topology.rank == 0:
        print_result(document, config)
    return EXIT_OK


@contextmanager
def redirect_stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, so that output of the recipe does not mix with the document."""
    sys.stdout.flush()
    stdout_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout_fd, 1)
        os.close(stdout_fd)
