"""The command line: a table from a verb to a function. Each verb imports what it needs, so that `plan` needs no torch."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.topology import Topology

__all__ = ["VERBS", "main"]


def train(args: Sequence[str]) -> int:
    """One run, or with -m one after the other; under torchrun, this rank's part of it."""
    from launcher.arguments import Arguments

    topology, asked = Topology.of(), Arguments.parse(args)
    if topology is not None:
        return work(args, asked.multirun, topology)
    from launcher import config

    if asked.multirun:
        return config.multirun(args, drive)
    composed = config.resolve(args)
    for note in composed.notes:
        tell(note)
    return drive(composed.run)


def work(args: Sequence[str], multirun: bool, topology: Topology) -> int:
    if multirun:
        raise RequestError(f"-m under torchrun would mix the runs up: type launcher {' '.join(args)} without torchrun")
    from launcher import worker

    return int(worker.main(list(args), topology))


def drive(run: object) -> int:
    """One run from the driver: starts torchrun and ends when it ends."""
    from launcher import launch

    return int(launch.drive(run))


def worker(args: Sequence[str]) -> int:
    """Internal: a worker that the driver started, with the file that hands the run over."""
    from launcher import worker as workers

    topology = Topology.of()
    if topology is None or len(args) != 1:
        raise RequestError("worker is started by the driver alone: type launcher, or torchrun -m launcher")
    return int(workers.main_handover(args[0], topology))


def plan(args: Sequence[str]) -> int:
    """Shows batch, rate and schedule at every world size; starts nothing."""
    import json

    from launcher import config, planning, recipe

    composed = config.resolve(args)
    for note in composed.notes:
        tell(note)
    run = composed.run
    document = planning.plan_document(run, recipe.sizes(recipe.build(run.recipe)), run.plan.worlds)
    print(json.dumps(document) if run.format == "json" else planning.plan_table(document))
    return EXIT_OK


VERBS: Mapping[str, Callable[[Sequence[str]], int]] = {"train": train, "plan": plan, "worker": worker}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb, `train` where none is given, and returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = dispatch(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who read has gone: nothing is left to say
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except RequestError as error:
        return refuse(error, args, EXIT_REQUEST, str(error))
    except Exception as error:
        return refuse(error, args, EXIT_FAILED, f"{type(error).__name__}: {error} (debug=true shows where)")


def dispatch(args: list[str]) -> int:
    sys.path.insert(0, os.getcwd())  # a recipe in the current folder, also for the console command
    verb, rest = (args[0], args[1:]) if args and is_verb(args[0]) else ("train", args)
    if verb not in VERBS:
        from launcher.keys import nearest

        known = [name for name in VERBS if name != "worker"]
        raise RequestError(f"{verb} is no verb: " + (f"did you mean {meant}?" if (meant := nearest(verb, known)) else f"choose from {', '.join(known)}"))
    return VERBS[verb](rest) if verb == "worker" else show(rest) or VERBS[verb](rest)


def is_verb(word: str) -> bool:
    return "=" not in word and not word.startswith(("-", "+", "~"))
