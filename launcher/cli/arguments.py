"""What the commands share: the flags that only print, the resolved configuration, and notes on stderr."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence

from launcher.config.cli_args import HydraArgs
from launcher.config.schema import RunConfig
from launcher.system.stderr import print_stderr

__all__ = ["add_current_folder_to_path", "handle_help_flag", "handle_info_flags", "print_notes", "resolve_config"]


def resolve_config(args: Sequence[str]) -> RunConfig:
    """Resolve the configuration; print decisions made for the user to stderr."""
    from launcher.config import compose

    composed = compose.resolve(args)
    print_notes(composed.notes)
    return composed.config


def print_notes(notes: Iterable[str | None]) -> None:
    for note in notes:
        if note is not None:
            print_stderr(f"note: {note}")


def handle_info_flags(flags: HydraArgs, args: Sequence[str]) -> bool:
    """Handle --help, --version, --cfg and --info: print to stdout, and return whether one of them was given."""
    if flags.help:
        print_help()
    elif flags.version:
        from importlib.metadata import version

        print(f"launcher {version('elastic-batch-launcher')}")
    elif flags.cfg or flags.info:
        from launcher.config import compose

        print(compose.show_config(args), end="")
    return bool(flags.help or flags.version or flags.cfg or flags.info)


def handle_help_flag(args: Sequence[str]) -> bool:
    """Handle --help for a command without overrides; return whether it was given."""
    if {"-h", "--help"}.isdisjoint(args):
        return False
    print_help()
    return True


def print_help() -> None:
    from launcher.cli.help import format_help

    print(format_help(min(shutil.get_terminal_size().columns, 100)), end="")


def add_current_folder_to_path() -> None:
    """Put the current folder on sys.path, so that the console command can import a recipe from it."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
