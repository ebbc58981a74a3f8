"""The entry point of the command line: selects the command, and turns its errors into messages and exit statuses."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name

from launcher.cli.arguments import add_current_folder_to_path, handle_help
from launcher.config.keys import closest_match
from launcher.distributed.cleanup_process import CleanupProcess
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UsageError, format_named_error
from launcher.system.garbage_collection import own_this_process
from launcher.system.redaction import mask_secrets
from launcher.system.standard_streams import ensure_standard_streams
from launcher.system.stderr import print_stderr
from launcher.topology import Topology

__all__ = ["VERBS", "main"]

#: The function of each command. Its module is imported only when the command is run.
VERBS: Mapping[str, str] = {
    "train": "launcher.cli.train:run_train",
    "plan": "launcher.cli.plan:run_plan",
    "tune": "launcher.cli.tune:run_tune",
    "verify": "launcher.cli.verify:run_verify",
    "explain": "launcher.cli.reports:run_explain",
    "report": "launcher.cli.reports:run_report",
    "export": "launcher.cli.reports:run_export",
    "doctor": "launcher.cli.doctor:run_doctor",
    "stop": "launcher.cli.control:run_stop",
    "status": "launcher.cli.control:run_status",
    "watch": "launcher.cli.watch:run_watch",
    "new": "launcher.cli.new_recipe:run_new",
    "worker": "launcher.cli.internal:run_worker",
    "folder": "launcher.cli.internal:run_folder",
    "again": "launcher.cli.internal:run_again",
    "store": "launcher.cli.internal:run_store",
    "probe": "launcher.cli.internal:run_probe",
}
#: The commands that run the code of a recipe in their own process.
RECIPE_VERBS = ("train", "plan", "tune", "verify")
INTERNAL_VERBS = ("worker", "folder", "again", "store", "probe")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, `train` if none is given, and return the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    ensure_standard_streams()
    if argv is None:
        own_this_process()
    status = EXIT_FAILED
    try:
        refuse_undecodable(args)
        status = dispatch_verb(args, is_program=argv is None)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has closed the pipe: discard the rest
        return EXIT_FAILED if Topology.from_env() is None else status  # a worker has trained nevertheless
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UsageError as error:
        return print_error(error, args, EXIT_USAGE)
    except (Exception, SystemExit) as error:  # a recipe that calls sys.exit has not done what was asked
        return print_error(error, args, EXIT_FAILED)


def refuse_undecodable(args: Sequence[str]) -> None:
    """
    Raises:
        UsageError: an argument is not text in the encoding of file names, so that no file could record it.
    """
    for arg in args:
        try:
            arg.encode()
        except UnicodeEncodeError:
            shown = arg.encode(errors="backslashreplace").decode()
            raise UsageError(f"{shown} is not UTF-8: rename the file or folder, or type it relative to it") from None


def dispatch_verb(args: list[str], *, is_program: bool) -> int:
    add_current_folder_to_path()
    named = args[0] if args and is_verb(args[0]) else None
    verb, rest = (named, args[1:]) if named else ("train", args)
    if verb not in VERBS:
        choices = [name for name in VERBS if name not in INTERNAL_VERBS]
        similar = closest_match(verb, choices)
        hint = f"did you mean {similar}?" if similar else f"choose from {', '.join(choices)}"
        raise UsageError(f"{verb} is not a command: {hint}")
    if verb not in INTERNAL_VERBS and handle_help(rest, named):
        return EXIT_OK
    if is_program and verb in RECIPE_VERBS and Topology.from_env() is None:
        CleanupProcess.start()  # a worker starts its own
    return int(resolve_name(VERBS[verb])(rest))


def is_verb(arg: str) -> bool:
    return "=" not in arg and not arg.startswith(("-", "+", "~"))


def print_error(error: Exception | SystemExit, args: Sequence[str], status: int) -> int:
    """Print the error as one line on stderr, with a traceback for debug=true or a failing worker; return `status`.

    Any other command may be typed in a shell that has a worker's variables, e.g. in an allocation.

    Usage errors are printed by rank 0 only.
    """
    topology, is_usage_error = Topology.from_env(), status == EXIT_USAGE
    if is_usage_error and topology is not None and (topology.rank > 0 or topology.restarts):
        return status  # rank 0 has reported it at the first start
    debug = any(arg.lower() == "debug=true" for arg in args)
    is_worker = topology is not None and (not args or not is_verb(args[0]) or args[0] in ("train", "worker"))
    if debug or (is_worker and not is_usage_error):
        sys.stderr.write(mask_secrets("".join(traceback.format_exception(error))))
    from launcher.run_dir.failures import describe_error

    hint = "" if is_usage_error or debug else " (debug=true shows where)"
    message = describe_error(error)
    print_stderr(f"error: {message if is_usage_error else format_named_error(type(error).__name__, message)}{hint}")
    return status
