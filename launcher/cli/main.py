"""The command line: a table from verbs to functions. Each verb imports only what it needs: `plan` needs no torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from launcher.config.cli_args import HydraArgs, ReportArgs
from launcher.config.keys import closest_match
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UsageError
from launcher.system.redaction import mask_secrets
from launcher.system.stderr import print_stderr
from launcher.topology import Topology, count_slurm_restarts, get_slurm_job_id

__all__ = ["VERBS", "main"]


def run_train(args: Sequence[str]) -> int:
    """Train one run, or with -m several; under torchrun, act as this rank's worker."""
    asked, topology = HydraArgs.parse(args), Topology.from_env()
    if handle_info_flags(asked, args):
        return EXIT_OK
    if topology is not None:
        return run_as_rank(args, asked.multirun, topology)
    if not asked.multirun:
        return launch_or_submit(resolve_config(args), args)
    from launcher.sweep import run_sweep

    importable = import_module(
        "launcher.cli.main"
    )  # under `python -m` this module is __main__, which jobs cannot import
    return run_sweep.run_sweep(args, importable.launch_or_submit)


def run_as_rank(args: Sequence[str], multirun: bool, topology: Topology) -> int:
    if multirun:
        raise UsageError(f"-m does not work in torchrun: type launcher {' '.join(args)} without torchrun")
    from launcher.launch import worker

    return int(worker.main(list(args), topology))


def launch_or_submit(config: RunConfig, words: Sequence[str]) -> int:
    """Drive one run: start torchrun and wait for it, or submit a Slurm job with the overrides `words`."""
    add_current_folder_to_path()  # this may not be the process that parsed the command line
    if config.launch.kind == "slurm":
        from launcher.slurm import submit

        return int(submit.submit_run(config, words))
    from launcher.launch import driver

    return int(driver.launch_job(config))


def run_folder(args: Sequence[str]) -> int:
    """Internal, for a Slurm job script: print the run directory."""
    from launcher.slurm import submit

    print(submit.job_run_directory(resolve_config(args), get_slurm_job_id(), restarted=count_slurm_restarts() > 0))
    return EXIT_OK


def run_again(args: Sequence[str]) -> int:
    """Internal, for the script of a failed Slurm job: whether it should be requeued."""
    from launcher.slurm import submit

    return int(submit.should_requeue(args[0], get_slurm_job_id()))


def run_worker(args: Sequence[str]) -> int:
    """Internal: run a worker started by the driver, configured by the given handover file."""
    topology = Topology.from_env()
    if topology is None or len(args) != 1:
        raise UsageError("worker is started by the driver only: type launcher, or torchrun -m launcher")
    from launcher.launch import worker as workers

    return int(workers.main_handover(args[0], topology))


def run_plan(args: Sequence[str]) -> int:
    """Print the batch plan, learning rate and schedule at every world size, without starting a run."""
    if handle_info_flags(HydraArgs.parse(args), args):
        return EXIT_OK
    config = resolve_config(args)
    from launcher import recipe
    from launcher.plan import plan_table

    built = recipe.build_recipe(config.recipe)
    if config.batch.policy == "goodput":
        return run_goodput_plan(config, built)
    document = plan_table.make_plan_document(config, recipe.get_dataset_sizes(built), config.plan.world_sizes)
    if config.plan.memory:  # this needs the model, and therefore torch
        from launcher.plan.memory_model import make_memory_document
        from launcher.strategies.model_size import measure_model_size

        document["memory"] = make_memory_document(
            measure_model_size(built, config), [row["world"] for row in document["plans"]]
        )
    print(json.dumps(document) if config.format == "json" else plan_table.format_plan_table(document))
    return EXIT_OK


def run_goodput_plan(config: RunConfig, built: Any) -> int:
    """Run `plan` for batch.policy=goodput, using the update times measured on this machine."""
    from launcher import recipe
    from launcher.config import strategy_checks
    from launcher.goodput import measured_noise, plan_table
    from launcher.goodput.policy import BatchChooser, TimingProfile
    from launcher.system.formatting import encodable
    from launcher.tune import cache

    sizes = recipe.get_dataset_sizes(built)
    found = cache.matching_profiles(config, cache.source_hash(built), sizes.train)
    if isinstance(found, cache.CacheLookup):
        print_notes(found.said)
        raise UsageError(
            "batch.policy=goodput needs measured update times: type launcher tune with the same overrides, with 2 or "
            "more workers to measure the cost of communication"
        )
    profile = TimingProfile.from_documents(
        (one.found for one in found), every_micro=strategy_checks.needs_equal_micro_batches(config)
    )
    chooser = BatchChooser(profile, config, sizes.train)
    document = plan_table.goodput_plan_document(
        chooser, sizes, measured_noise.find_noise_scale(config), plan_table.format_measurements(found)
    )
    written = json.dumps(document) if config.format == "json" else plan_table.goodput_plan_text(document).rstrip()
    print(encodable(written, sys.stdout))
    return EXIT_OK


def run_tune(args: Sequence[str]) -> int:
    """Measure per-device batch sizes and recommend one, with -m for each point; under torchrun, act as this rank."""
    asked, topology = HydraArgs.parse(args), Topology.from_env()
    if handle_info_flags(asked, args):
        return EXIT_OK
    if asked.multirun:
        return run_tune_multirun(args, topology)
    from launcher.tune import driver as tuning

    return (
        tuning.tune_batch_size(resolve_config(args))
        if topology is None
        else tuning.main(lambda: resolve_config(args), topology)
    )


def run_tune_multirun(args: Sequence[str], topology: Topology | None) -> int:
    if topology is not None:
        typed = ["tune", *args, f"launch.workers={topology.world}"]
        raise UsageError(f"-m does not work in torchrun: type launcher {' '.join(typed)} without torchrun")
    from launcher.tune import tune_sweep

    return tune_sweep.tune_sweep(args)


def run_probe(args: Sequence[str]) -> int:
    """Internal: run a measurement, either for the driver (with a worker count) or beside a worker (with a rank)."""
    from launcher.distributed.commands import NPROC_FLAG
    from launcher.tune.processes import fork_server, probe_process

    if Topology.from_env() is not None and len(args) == 1:
        return probe_process.main(args[0])
    if len(args) != 2 or not args[0].startswith(NPROC_FLAG):
        raise UsageError("probe is started by the launcher only: type launcher tune")
    return fork_server.main(args[1], int(args[0].removeprefix(NPROC_FLAG)))


def run_verify(args: Sequence[str]) -> int:
    """Check that splitting the batch gives the same gradient; exit 1 if it does not and no layer explains it."""
    if handle_info_flags(HydraArgs.parse(args), args):
        return EXIT_OK
    config = resolve_config(args)
    from launcher.train import verify as verifying

    verdict = verifying.verify(config)
    print(
        json.dumps(verdict.to_document())
        if config.format == "json"
        else verifying.format_verify_result(verdict).rstrip()
    )
    return EXIT_OK if verdict.is_acceptable else EXIT_FAILED


def run_explain(args: Sequence[str]) -> int:
    """Report what limits a run, or why one of two runs is faster, from their metrics."""
    words = ReportArgs.parse("explain", args, json=True)
    if handle_help(words):
        return EXIT_OK
    if len(words.paths) not in (1, 2):
        raise UsageError(f"explain {' '.join(words.paths)}: type launcher explain RUN, or launcher explain RUN_A RUN_B")
    from launcher.analysis import explain as explaining
    from launcher.analysis.run_profile import compute_profile
    from launcher.run_dir.metrics_reader import read_run_metrics

    runs = [read_run_metrics(path) for path in words.paths]
    print_notes(run.describe_unreadable() for run in runs)
    profiles = [compute_profile(run) for run in runs]
    document = explaining.compare_runs(*profiles) if len(profiles) > 1 else explaining.explain_run(profiles[0])
    print(
        json.dumps(document) if words.json else explaining.format_explanation(document), end="\n" if words.json else ""
    )
    return EXIT_OK


def run_export(args: Sequence[str]) -> int:
    """Write the metrics of a run as CSV."""
    words = ReportArgs.parse("export", args, output=True)
    if handle_help(words):
        return EXIT_OK
    if len(words.paths) != 1:
        raise UsageError(
            f"export {' '.join(words.paths)}: type launcher export RUN, or launcher export RUN -o FILE.csv"
        )
    from launcher.analysis.csv_export import format_csv
    from launcher.run_dir.metrics_reader import read_run_metrics

    run = read_run_metrics(words.paths[0])
    print_notes([run.describe_unreadable()])
    if words.output is None:
        print(format_csv(run.rows), end="")
    else:
        write_output_file(Path(words.output), format_csv(run.rows))
    return EXIT_OK


def run_report(args: Sequence[str]) -> int:
    """Write a self-contained HTML report about one run, or comparing several."""
    words = ReportArgs.parse("report", args, output=True)
    if handle_help(words):
        return EXIT_OK
    if not words.paths:
        raise UsageError("report: type launcher report RUN..., or launcher report RUN... -o FILE.html")
    from launcher.analysis.html_report import default_output_path, load_reports, render_report

    runs = list(load_reports(words.paths))
    print_notes(run.history.describe_unreadable() for run in runs)
    write_output_file(Path(words.output) if words.output else default_output_path(words.paths), render_report(runs))
    return EXIT_OK


def run_doctor(args: Sequence[str]) -> int:
    """Check this machine, ending with a two-process job; exit 1 if a required check fails."""
    if handle_help_flag(args):
        return EXIT_OK
    if Topology.from_env() is not None:
        raise UsageError("doctor starts a job of its own: type launcher doctor, without torchrun")
    from launcher.cli import doctor as examining

    return examining.run_checks(args)


def run_stop(args: Sequence[str]) -> int:
    """Request that a run save and stop, or with --now kill it without saving."""
    if handle_help_flag(args):
        return EXIT_OK
    runs = [arg for arg in args if not arg.startswith("-")]
    if len(runs) != 1 or set(args) - {*runs, "--now"}:
        raise UsageError(f"stop {' '.join(args)}: type launcher stop RUN, or launcher stop RUN --now")
    from launcher.cli import control

    return control.stop_run(runs[0], now="--now" in args)


def run_status(args: Sequence[str]) -> int:
    """Print the status of a run."""
    if handle_help_flag(args):
        return EXIT_OK
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError(f"status takes one run, not {len(args)}: type launcher status RUN")
    from launcher.cli import control

    return control.print_status(args[0])


def run_watch(args: Sequence[str]) -> int:
    """Show the live metrics of a run."""
    if handle_help_flag(args):
        return EXIT_OK
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError(f"watch takes one run, not {' '.join(args) or 'none'}: type launcher watch RUN")
    from launcher.cli import watch

    return watch.watch_run(args[0])


def run_new(args: Sequence[str]) -> int:
    """Write the skeleton of a custom recipe into the current folder."""
    if handle_help_flag(args):
        return EXIT_OK
    if len(args) != 1 or args[0].startswith("-"):
        raise UsageError(f"new takes one name, not {' '.join(args) or 'none'}: type launcher new my_recipe")
    from launcher.cli import new_recipe

    print(new_recipe.write_skeleton(args[0], Path()))
    return EXIT_OK


def run_store(args: Sequence[str]) -> int:
    """Internal, for the script of a pool task: serve the pool's rendezvous, or with one argument print its endpoint.

    A node that requests the endpoint is also registered as waiting to join.
    """
    from launcher.distributed import join_gate
    from launcher.run_dir.run_directory import RunDirectory
    from launcher.slurm import rendezvous_service

    if len(args) == 1:
        where = rendezvous_service.wait_for_endpoint(Path(args[0]))
        join_gate.wait_to_join(RunDirectory(Path(args[0])), f"{socket.gethostname()}-{os.getpid()}")
        print(where)
    else:
        rendezvous_service.serve_store(Path(args[0]), args[1])
    return EXIT_OK


def resolve_config(args: Sequence[str]) -> RunConfig:
    """Resolve the configuration; print decisions made for the user to stderr."""
    from launcher.config import compose

    composed = compose.resolve(args)
    for note in composed.notes:
        print_stderr(f"note: {note}")
    return composed.config


def handle_info_flags(asked: HydraArgs, args: Sequence[str]) -> bool:
    """Handle --help, --version, --cfg and --info: print to stdout, and return whether one of them was given."""
    if asked.help:
        from launcher.cli.help import format_help

        print(format_help(min(shutil.get_terminal_size().columns, 100)), end="")
    elif asked.version:
        from importlib.metadata import version

        print(f"launcher {version('elastic-batch-launcher')}")
    elif asked.cfg or asked.info:
        from launcher.config import compose

        print(compose.show_config(args), end="")
    return bool(asked.help or asked.version or asked.cfg or asked.info)


def handle_help(words: ReportArgs) -> bool:
    return words.help and handle_info_flags(HydraArgs(help=True), ())


def handle_help_flag(args: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(args) and handle_info_flags(HydraArgs(help=True), ())


def write_output_file(file: Path, text: str) -> None:
    """Write the file atomically and print its path; write directly into an existing link, pipe or device."""
    from launcher.system.atomic_files import atomic_write_text

    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            file.write_text(text, encoding="utf-8")
            return
        atomic_write_text(file, text)
    except OSError as problem:
        raise UsageError(f"-o {file} cannot be written ({problem.strerror}): type another -o FILE") from problem
    print(file)


def print_notes(notes: Iterable[str | None]) -> None:
    for note in notes:
        if note is not None:
            print_stderr(f"note: {note}")


VERBS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "train": run_train,
    "plan": run_plan,
    "tune": run_tune,
    "verify": run_verify,
    "explain": run_explain,
    "report": run_report,
    "export": run_export,
    "doctor": run_doctor,
    "stop": run_stop,
    "status": run_status,
    "watch": run_watch,
    "new": run_new,
    "worker": run_worker,
    "folder": run_folder,
    "again": run_again,
    "store": run_store,
    "probe": run_probe,
}
INTERNAL_VERBS = ("worker", "folder", "again", "store", "probe")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb, `train` if none is given, and return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = dispatch_verb(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has closed the pipe: discard the rest
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UsageError as error:
        return print_error(error, args, EXIT_USAGE)
    except Exception as error:
        return print_error(error, args, EXIT_FAILED)


def dispatch_verb(args: list[str]) -> int:
    add_current_folder_to_path()
    verb, rest = (args[0], args[1:]) if args and is_verb(args[0]) else ("train", args)
    if verb not in VERBS:
        known = [name for name in VERBS if name not in INTERNAL_VERBS]
        meant = closest_match(verb, known)
        raise UsageError(
            f"{verb} is not a verb: " + (f"did you mean {meant}?" if meant else f"choose from {', '.join(known)}")
        )
    return VERBS[verb](rest)


def add_current_folder_to_path() -> None:
    """Put the current folder on sys.path, so that the console command can import a recipe from it."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def is_verb(word: str) -> bool:
    return "=" not in word and not word.startswith(("-", "+", "~"))


def print_error(error: Exception, args: Sequence[str], status: int) -> int:
    """Print the error as one line on stderr, with a traceback for debug=true or a failing worker; return `status`.

    Usage errors are printed by rank 0 only.
    """
    topology, request = Topology.from_env(), status == EXIT_USAGE
    if request and topology is not None and (topology.rank > 0 or topology.restarts):
        return status  # rank 0 has reported it at the first start
    debug = any(arg.lower() == "debug=true" for arg in args)
    if debug or (topology is not None and not request):
        sys.stderr.write(mask_secrets("".join(traceback.format_exception(error))))
    hint = "" if request or debug else " (debug=true shows where)"
    print_stderr(f"error: {error}" if request else f"error: {type(error).__name__}: {error}{hint}")
    return status


if __name__ == "__main__":
    sys.exit(main())
