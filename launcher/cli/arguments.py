"""What the commands share: the flags that only print, the resolved configuration, and notes on stderr."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

from launcher.config.cli_args import HydraArgs
from launcher.config.schema import RunConfig
from launcher.system.garbage_collection import paused_garbage_collection
from launcher.system.stderr import print_stderr
from launcher.topology import Topology

__all__ = ["add_current_folder_to_path", "handle_help", "handle_info_flags", "print_notes", "resolve_config"]


def resolve_config(args: Sequence[str]) -> RunConfig:
    """Resolve the configuration; print decisions made for the user to stderr."""
    if "launcher.config.compose" not in sys.modules:  # a pause keeps the garbage that exists by then
        with paused_garbage_collection():
            import_module("launcher.config.compose")
    from launcher.config import compose

    composed = compose.resolve(args)
    print_notes(composed.notes)
    return composed.config


def print_notes(notes: Iterable[str | None]) -> None:
    for note in notes:
        if note is not None:
            print_stderr(f"note: {note}")


def handle_info_flags(flags: HydraArgs, args: Sequence[str]) -> bool:
    """Handle --version, --cfg and --info: print to stdout, and return whether one of them was given."""
    if flags.version:
        from importlib.metadata import version

        print(f"launcher {version('elastic-batch-launcher')}")
    elif flags.cfg or flags.info:
        from launcher.config import compose

        print(compose.show_config(args), end="")
    return bool(flags.version or flags.cfg or flags.info)


def handle_help(args: Sequence[str], verb: str | None) -> bool:
    """Print the help if --help was given, of the command if one was named, or if nothing was; return whether it was."""
    from launcher.cli import help as help_texts

    width = min(shutil.get_terminal_size().columns, 100)
    if not {"-h", "--help"}.isdisjoint(args):
        print(help_texts.format_help(width) if verb is None else help_texts.format_verb_help(verb, width), end="")
        return True
    if verb is None and not args and Topology.from_env() is None:
        print(help_texts.format_short_help(width), end="")
        return True
    return False


def add_current_folder_to_path() -> None:
    """Put the current folder on sys.path, so that the console command can import a recipe from it."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
