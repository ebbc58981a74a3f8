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

from launcher.arguments import Arguments, Words
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.keys import nearest
from launcher.redact import redact
from launcher.settings import Run
from launcher.topology import Topology, slurm_job, slurm_restarts

__all__ = ["VERBS", "main"]


def train(args: Sequence[str]) -> int:
    """Train one run, or with -m several; under torchrun, act as this rank's worker."""
    asked, topology = Arguments.parse(args), Topology.of()
    if answered(asked, args):
        return EXIT_OK
    if topology is not None:
        return work(args, asked.multirun, topology)
    if not asked.multirun:
        return drive(resolved(args), args)
    from launcher import multirun

    importable = import_module(
        "launcher.__main__"
    )  # under `python -m` this module is __main__, which jobs cannot import
    return multirun.multirun(args, importable.drive)


def work(args: Sequence[str], multirun: bool, topology: Topology) -> int:
    if multirun:
        raise RequestError(f"-m does not work in torchrun: type launcher {' '.join(args)} without torchrun")
    from launcher import worker

    return int(worker.main(list(args), topology))


def drive(run: Run, words: Sequence[str]) -> int:
    """Drive one run: start torchrun and wait for it, or submit a Slurm job with the overrides `words`."""
    see_current_folder()  # this may not be the process that parsed the command line
    if run.launch.kind == "slurm":
        from launcher import submit

        return int(submit.drive(run, words))
    from launcher import launch

    return int(launch.drive(run))


def folder(args: Sequence[str]) -> int:
    """Internal, for a Slurm job script: print the run directory."""
    from launcher import submit

    print(submit.folder(resolved(args), slurm_job(), restarted=slurm_restarts() > 0))
    return EXIT_OK


def again(args: Sequence[str]) -> int:
    """Internal, for the script of a failed Slurm job: whether it should be requeued."""
    from launcher import submit

    return int(submit.again(args[0], slurm_job()))


def worker(args: Sequence[str]) -> int:
    """Internal: run a worker started by the driver, configured by the given handover file."""
    topology = Topology.of()
    if topology is None or len(args) != 1:
        raise RequestError("worker is started by the driver only: type launcher, or torchrun -m launcher")
    from launcher import worker as workers

    return int(workers.main_handover(args[0], topology))


def plan(args: Sequence[str]) -> int:
    """Print the batch plan, learning rate and schedule at every world size, without starting a run."""
    if answered(Arguments.parse(args), args):
        return EXIT_OK
    run = resolved(args)
    from launcher import planning, recipe

    built = recipe.build(run.recipe)
    if run.batch.policy == "goodput":
        return foreseen(run, built)
    document = planning.plan_document(run, recipe.sizes(built), run.plan.worlds)
    if run.plan.memory:  # this needs the model, and therefore torch
        from launcher.footprint import memory_document
        from launcher.weighing import weigh

        document["memory"] = memory_document(weigh(built, run), [row["world"] for row in document["plans"]])
    print(json.dumps(document) if run.format == "json" else planning.plan_table(document))
    return EXIT_OK


def foreseen(run: Run, built: Any) -> int:
    """Run `plan` for batch.policy=goodput, using the update times measured on this machine."""
    from launcher import observed, outlook, recipe, strategies
    from launcher.goodput import Chooser, Profile
    from launcher.sinks.text import printable
    from launcher.tune import cache

    sizes = recipe.sizes(built)
    found = cache.family(run, cache.code_of(built), sizes.train)
    if isinstance(found, cache.Looked):
        noted(found.said)
        raise RequestError(
            "batch.policy=goodput needs measured update times: type launcher tune with the same overrides, with 2 or "
            "more workers to measure the cost of communication"
        )
    profile = Profile.of((one.found for one in found), every_micro=strategies.even(run))
    chooser = Chooser(profile, run, sizes.train)
    document = outlook.outlook(chooser, sizes, observed.noise_of(run), outlook.measured_text(found))
    written = json.dumps(document) if run.format == "json" else outlook.outlook_text(document).rstrip()
    print(printable(written, sys.stdout))
    return EXIT_OK


def tune(args: Sequence[str]) -> int:
    """Measure per-device batch sizes and recommend one, with -m for each point; under torchrun, act as this rank."""
    asked, topology = Arguments.parse(args), Topology.of()
    if answered(asked, args):
        return EXIT_OK
    if asked.multirun:
        return tune_several(args, topology)
    from launcher.tune import drive as tuning

    return tuning.drive(resolved(args)) if topology is None else tuning.main(lambda: resolved(args), topology)


def tune_several(args: Sequence[str], topology: Topology | None) -> int:
    if topology is not None:
        typed = ["tune", *args, f"launch.workers={topology.world}"]
        raise RequestError(f"-m does not work in torchrun: type launcher {' '.join(typed)} without torchrun")
    from launcher.tune import several

    return several.several(args)


def probe(args: Sequence[str]) -> int:
    """Internal: run a measurement, either for the driver (with a worker count) or beside a worker (with a rank)."""
    from launcher.launch import WORKERS
    from launcher.tune import errand, host

    if Topology.of() is not None and len(args) == 1:
        return errand.main(args[0])
    if len(args) != 2 or not args[0].startswith(WORKERS):
        raise RequestError("probe is started by the launcher only: type launcher tune")
    return host.main(args[1], int(args[0].removeprefix(WORKERS)))


def verify(args: Sequence[str]) -> int:
    """Check that splitting the batch gives the same gradient; exit 1 if it does not and no layer explains it."""
    if answered(Arguments.parse(args), args):
        return EXIT_OK
    run = resolved(args)
    from launcher import verify as verifying

    verdict = verifying.verify(run)
    print(json.dumps(verdict.document()) if run.format == "json" else verifying.text(verdict).rstrip())
    return EXIT_OK if verdict.sound else EXIT_FAILED


def explain(args: Sequence[str]) -> int:
    """Report what limits a run, or why one of two runs is faster, from their metrics."""
    words = Words.parse("explain", args, json=True)
    if shown_help(words):
        return EXIT_OK
    if len(words.paths) not in (1, 2):
        raise RequestError(
            f"explain {' '.join(words.paths)}: type launcher explain RUN, or launcher explain RUN_A RUN_B"
        )
    from launcher import explain as explaining
    from launcher.history import history

    runs = [history(path) for path in words.paths]
    noted(run.note() for run in runs)
    profiles = [explaining.profile(run) for run in runs]
    document = explaining.compared(*profiles) if len(profiles) > 1 else explaining.explained(profiles[0])
    print(json.dumps(document) if words.json else explaining.text(document), end="\n" if words.json else "")
    return EXIT_OK


def export(args: Sequence[str]) -> int:
    """Write the metrics of a run as CSV."""
    words = Words.parse("export", args, output=True)
    if shown_help(words):
        return EXIT_OK
    if len(words.paths) != 1:
        raise RequestError(
            f"export {' '.join(words.paths)}: type launcher export RUN, or launcher export RUN -o FILE.csv"
        )
    from launcher.export import as_csv
    from launcher.history import history

    run = history(words.paths[0])
    noted([run.note()])
    if words.output is None:
        print(as_csv(run.rows), end="")
    else:
        written(Path(words.output), as_csv(run.rows))
    return EXIT_OK


def report(args: Sequence[str]) -> int:
    """Write a self-contained HTML report about one run, or comparing several."""
    words = Words.parse("report", args, output=True)
    if shown_help(words):
        return EXIT_OK
    if not words.paths:
        raise RequestError("report: type launcher report RUN..., or launcher report RUN... -o FILE.html")
    from launcher.report import page, place, stories

    runs = list(stories(words.paths))
    noted(run.history.note() for run in runs)
    written(Path(words.output) if words.output else place(words.paths), page(runs))
    return EXIT_OK


def doctor(args: Sequence[str]) -> int:
    """Check this machine, ending with a two-process job; exit 1 if a required check fails."""
    if asks_for_help(args):
        return EXIT_OK
    if Topology.of() is not None:
        raise RequestError("doctor starts a job of its own: type launcher doctor, without torchrun")
    from launcher import doctor as examining

    return examining.doctor(args)


def stop(args: Sequence[str]) -> int:
    """Request that a run save and stop, or with --now kill it without saving."""
    if asks_for_help(args):
        return EXIT_OK
    runs = [arg for arg in args if not arg.startswith("-")]
    if len(runs) != 1 or set(args) - {*runs, "--now"}:
        raise RequestError(f"stop {' '.join(args)}: type launcher stop RUN, or launcher stop RUN --now")
    from launcher import control

    return control.stop(runs[0], now="--now" in args)


def status(args: Sequence[str]) -> int:
    """Print the status of a run."""
    if asks_for_help(args):
        return EXIT_OK
    if len(args) != 1 or args[0].startswith("-"):
        raise RequestError(f"status takes one run, not {len(args)}: type launcher status RUN")
    from launcher import control

    return control.status(args[0])


def watch(args: Sequence[str]) -> int:
    """Show the live metrics of a run."""
    if asks_for_help(args):
        return EXIT_OK
    if len(args) != 1 or args[0].startswith("-"):
        raise RequestError(f"watch takes one run, not {' '.join(args) or 'none'}: type launcher watch RUN")
    from launcher import watching

    return watching.watch(args[0])


def new(args: Sequence[str]) -> int:
    """Write the skeleton of a custom recipe into the current folder."""
    if asks_for_help(args):
        return EXIT_OK
    if len(args) != 1 or args[0].startswith("-"):
        raise RequestError(f"new takes one name, not {' '.join(args) or 'none'}: type launcher new my_recipe")
    from launcher import skeleton

    print(skeleton.new(args[0], Path()))
    return EXIT_OK


def store(args: Sequence[str]) -> int:
    """Internal, for the script of a pool task: serve the pool's rendezvous, or with one argument print its endpoint.

    A node that requests the endpoint is also registered as waiting to join.
    """
    from launcher import gate, pool
    from launcher.runfolder import RunFolder

    if len(args) == 1:
        where = pool.endpoint(Path(args[0]))
        gate.knock(RunFolder(Path(args[0])), f"{socket.gethostname()}-{os.getpid()}")
        print(where)
    else:
        pool.serve(Path(args[0]), args[1])
    return EXIT_OK


def resolved(args: Sequence[str]) -> Run:
    """Resolve the configuration; print decisions made for the user to stderr."""
    from launcher import config

    composed = config.resolve(args)
    for note in composed.notes:
        tell(f"note: {note}")
    return composed.run


def answered(asked: Arguments, args: Sequence[str]) -> bool:
    """Handle --help, --version, --cfg and --info: print to stdout, and return whether one of them was given."""
    if asked.help:
        from launcher.manual import help_text

        print(help_text(min(shutil.get_terminal_size().columns, 100)), end="")
    elif asked.version:
        from importlib.metadata import version

        print(f"launcher {version('elastic-batch-launcher')}")
    elif asked.cfg or asked.info:
        from launcher import config

        print(config.show_config(args), end="")
    return bool(asked.help or asked.version or asked.cfg or asked.info)


def shown_help(words: Words) -> bool:
    return words.help and answered(Arguments(help=True), ())


def asks_for_help(args: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(args) and answered(Arguments(help=True), ())


def written(file: Path, text: str) -> None:
    """Write the file atomically and print its path; write directly into an existing link, pipe or device."""
    from launcher.durable import write_whole

    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            file.write_text(text, encoding="utf-8")
            return
        write_whole(file, text)
    except OSError as problem:
        raise RequestError(f"-o {file} cannot be written ({problem.strerror}): type another -o FILE") from problem
    print(file)


def noted(notes: Iterable[str | None]) -> None:
    for note in notes:
        if note is not None:
            tell(f"note: {note}")


VERBS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "plan": plan,
    "tune": tune,
    "verify": verify,
    "explain": explain,
    "report": report,
    "export": export,
    "doctor": doctor,
    "stop": stop,
    "status": status,
    "watch": watch,
    "new": new,
    "worker": worker,
    "folder": folder,
    "again": again,
    "store": store,
    "probe": probe,
}
INTERNAL = ("worker", "folder", "again", "store", "probe")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb, `train` if none is given, and return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = dispatch(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has closed the pipe: discard the rest
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except RequestError as error:
        return refuse(error, args, EXIT_REQUEST)
    except Exception as error:
        return refuse(error, args, EXIT_FAILED)


def dispatch(args: list[str]) -> int:
    see_current_folder()
    verb, rest = (args[0], args[1:]) if args and is_verb(args[0]) else ("train", args)
    if verb not in VERBS:
        known = [name for name in VERBS if name not in INTERNAL]
        meant = nearest(verb, known)
        raise RequestError(
            f"{verb} is not a verb: " + (f"did you mean {meant}?" if meant else f"choose from {', '.join(known)}")
        )
    return VERBS[verb](rest)


def see_current_folder() -> None:
    """Put the current folder on sys.path, so that the console command can import a recipe from it."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def is_verb(word: str) -> bool:
    return "=" not in word and not word.startswith(("-", "+", "~"))


def refuse(error: Exception, args: Sequence[str], status: int) -> int:
    """Print the error as one line on stderr, with a traceback for debug=true or a failing worker; return `status`.

    Usage errors are printed by rank 0 only.
    """
    topology, request = Topology.of(), status == EXIT_REQUEST
    if request and topology is not None and (topology.rank > 0 or topology.restarts):
        return status  # rank 0 has reported it at the first start
    debug = any(arg.lower() == "debug=true" for arg in args)
    if debug or (topology is not None and not request):
        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    hint = "" if request or debug else " (debug=true shows where)"
    tell(f"error: {error}" if request else f"error: {type(error).__name__}: {error}{hint}")
    return status


def tell(text: str) -> None:
    print(redact(" ".join(text.split())), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
