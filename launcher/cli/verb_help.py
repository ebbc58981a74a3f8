"""The help of each command: its usage, what it does, its options, and the keys that it adds."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["VERB_HELP", "VerbHelp", "format_command_list", "format_usage"]

FORMAT_OPTION = ("format=json", "print one JSON document to stdout, notes to stderr")
HYDRA_OPTIONS = (
    ("-cd, --config-dir DIR", "directory of your recipe/*.yaml, experiment/*.yaml"),
    ("-c, --cfg job", "show the resolved configuration and do nothing else"),
)
MULTIRUN_OPTION = ("-m, --multirun", "one run per combination of values a,b,c")


@dataclass(frozen=True)
class VerbHelp:
    """The help of one command.

    `arguments` follow its name in the usage line, `summary` is its line in the list of commands, `text` says what it
    does, `options` are pairs of an option and its meaning. `keys` are the prefixes of the configuration keys that
    matter to it; all keys if it is ("",), none if it takes no overrides.
    """

    arguments: str
    summary: str
    text: str
    options: tuple[tuple[str, str], ...] = ()
    keys: tuple[str, ...] = ()


VERB_HELP: Mapping[str, VerbHelp] = {
    "train": VerbHelp(
        "[FLAGS] [OVERRIDES]",
        "train a run; the default",
        "Trains a recipe with launch.workers processes on this machine, in a Slurm job with launch=slurm, or as a "
        "rank under torchrun. It writes everything to a folder in runs/, from which the same command with run.name= "
        "continues. The exit status is 0 if the run finished or was stopped after saving, 1 if training failed and 2 "
        "if the request is wrong.",
        (MULTIRUN_OPTION, *HYDRA_OPTIONS),
        ("",),
    ),
    "plan": VerbHelp(
        "[FLAGS] [OVERRIDES]",
        "batch, learning rate and shares per world size; format=json",
        "Shows the batch plan, the learning rate and the warmup for each number of workers, and why a number is "
        "impossible. Nothing is started, and torch is not imported.",
        (FORMAT_OPTION, *HYDRA_OPTIONS),
        ("plan.", "batch.", "lr.", "elastic.min_workers", "elastic.max_workers"),
    ),
    "tune": VerbHelp(
        "[FLAGS] [OVERRIDES]",
        "measure batch sizes and recommend one; -m; format=json",
        "Trains a few updates with batches of different sizes per worker, as the overrides say otherwise, and "
        "recommends batch.per_device. Also works under torchrun. The result is kept for batch.per_device=auto.",
        (("-m, --multirun", "measure for each combination of values a,b,c"), FORMAT_OPTION, *HYDRA_OPTIONS),
        ("tune.", "plan.noise", "launch.workers"),
    ),
    "verify": VerbHelp(
        "[FLAGS] [OVERRIDES]",
        "check that splitting the batch keeps the gradient; format=json",
        "Compares the gradient of one batch of your recipe with that of the same batch split into micro-batches and "
        "over workers, and names the layers or the loss that make a difference.",
        (FORMAT_OPTION, *HYDRA_OPTIONS),
        ("batch.per_device", "batch.accumulation", "train.precision"),
    ),
    "stop": VerbHelp(
        "RUN [--now]",
        "save and stop a run; --now kills it without saving",
        "Asks a run, on this machine or in a Slurm job, to save at the next update and to stop. Continue it with its "
        "own command and run.name=RUN. RUN is a name in runs/ or the path of a run directory.",
        (("--now", "kill it without saving"),),
    ),
    "status": VerbHelp(
        "RUN",
        "progress of a run, and who runs it",
        "Prints how far a run is, its latest metrics, and the process or Slurm job that runs it. RUN is a name in "
        "runs/ or the path of a run directory.",
    ),
    "watch": VerbHelp(
        "RUN",
        "live metrics; Ctrl-C stops watching, the run continues",
        "Shows a run as its own terminal does, until it ends. RUN is a name in runs/ or the path of a run directory.",
    ),
    "explain": VerbHelp(
        "RUN [RUN_B]",
        "what limits a run, or why one of two is faster; format=json",
        "One run: the stage that takes most of the time, and what to change. Two runs: which is faster, and the stage "
        "that differs. Each RUN is a name in runs/ or the path of a run directory.",
        (FORMAT_OPTION,),
    ),
    "report": VerbHelp(
        "RUN... [-o FILE.html]",
        "HTML page with curves and stage times; -o FILE.html",
        "Writes one HTML page that needs no network. Several runs, or a folder of runs such as a sweep, are compared. "
        "Each RUN is a name in runs/ or a path.",
        (("-o FILE.html", "the page; by default report.html in the folder of the run or sweep"),),
    ),
    "export": VerbHelp(
        "RUN [-o FILE.csv]",
        "metrics as CSV; -o FILE.csv",
        "Prints the metrics of a run as CSV: one line per update, one column per metric. RUN is a name in runs/ or "
        "the path of a run directory.",
        (("-o FILE.csv", "write to FILE.csv instead of stdout"),),
    ),
    "doctor": VerbHelp(
        "[format=json]",
        "check this machine and run a two-process job; format=json",
        "Checks Python, torch, the network, memory and the optional packages, and trains for a moment with two "
        "processes. The exit status is 1 if a required check fails.",
        (FORMAT_OPTION,),
    ),
    "new": VerbHelp(
        "NAME",
        "write NAME.py, a custom recipe that trains unchanged",
        "Writes the skeleton of a recipe of your own into the current folder, NAME.py and mine/recipe/NAME.yaml, and "
        "prints the commands to train, verify and tune it.",
    ),
}


def format_command_list() -> Iterator[str]:
    """One line per command, for the general help."""
    for verb, described in VERB_HELP.items():
        run = described.arguments.split(" ")[0]
        name = verb if run.startswith("[") else f"{verb} {run}"
        yield f"  {name:<16}{described.summary}"


def format_usage(verb: str, width: int) -> Iterator[str]:
    """The lines of a command's own help, without its keys."""
    described = VERB_HELP[verb]
    yield f"Usage: launcher {verb} {described.arguments}"
    yield ""
    yield from textwrap.wrap(described.text, width)
    if described.options:
        yield from ["", "Options"]
    for option, meaning in described.options:
        yield textwrap.fill(f"  {option:<24}{meaning}", width, subsequent_indent=" " * 26)
