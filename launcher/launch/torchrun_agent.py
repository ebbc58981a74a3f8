"""torchrun wrapper for jobs started by the driver: `python -m launcher.launch.torchrun_agent TORCHRUN-ARGUMENTS`.

Its rendezvous store listens on the loopback interface only (torch's own listens on all interfaces). The agent dies with
its driver and does not print its own failure report, because the driver prints the first root error.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.distributed.cleanup_process import CleanupProcess, private_temp_dir
from launcher.distributed.starter import die_with_starter, make_starter_env
from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.launch.waiting_agent import COMMAND_FLAG, read_command
from launcher.run_dir.silent_exits import append_exit_codes
from launcher.system.garbage_collection import own_this_process, paused_garbage_collection
from launcher.system.standard_streams import ensure_standard_streams

__all__ = ["main"]

FAILURES_FLAG = "--failures="


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with `argv`; a leading `--failures=FILE` names the file for the exit codes of each failed start.

    With `--command-from=FD` the arguments are read from there, after the imports.
    """
    ensure_standard_streams()
    die_with_starter()
    CleanupProcess.start()
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # the driver receives these and signals the workers itself
    signal.signal(signal.SIGTERM, lambda *_: None)  # as the others, but the workers must not inherit it as ignored

    with paused_garbage_collection():
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from launcher.distributed.rendezvous import make_loopback_store

    arguments: list[str] | None = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith(COMMAND_FLAG):
        arguments = read_command(int(arguments[0].removeprefix(COMMAND_FLAG)))
    if arguments is None:
        return EXIT_OK
    has_report = bool(arguments) and arguments[0].startswith(FAILURES_FLAG)
    report = arguments.pop(0).removeprefix(FAILURES_FLAG) if has_report else ""
    os.environ.update(make_starter_env())
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    if report:
        record_exit_codes(Path(report))
    store = make_loopback_store(0, serve=True)
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{store.port}", "--rdzv-conf=is_host=0"]
    options += ["--signals-to-handle=SIGQUIT", *(f"--log-dir={folder}" for folder in [private_temp_dir()] if folder)]
    try:
        run.main([*options, *arguments])
    except (ChildFailedError, SignalException):
        return EXIT_FAILED
    return EXIT_OK


def record_exit_codes(report: Path) -> None:
    """Make torchrun's agent write the exit codes of its workers each time that some have failed.

    torchrun itself reports only those of the last start, and none of a worker that left with 0 while others trained.
    After the first failure it ends the other workers: one that its signal ended is left out, because that says nothing
    about the worker.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    sent: dict[int, set[int]] = {}  # what a worker ends with that such a signal ends, by process
    close, monitor = SubprocessHandler.close, LocalElasticAgent._monitor_workers

    def note_and_close(self: Any, death_sig: signal.Signals | None = None) -> None:
        sent.setdefault(self.proc.pid, set()).add(-(death_sig or signal.SIGTERM))
        close(self, death_sig)

    def monitor_and_record(self: Any, group: Any) -> Any:
        result = monitor(self, group)
        if result.failures:
            processes = self._pcontext.subprocess_handlers
            left = {worker.global_rank: 0 for worker in group.workers if processes[worker.local_rank].proc.poll() == 0}
            failed = result.failures.items()
            own = {
                rank: failure.exitcode for rank, failure in failed if failure.exitcode not in sent.get(failure.pid, ())
            }
            append_exit_codes(report, left | own)
        return result

    SubprocessHandler.close = note_and_close  # type: ignore[method-assign]
    LocalElasticAgent._monitor_workers = monitor_and_record  # type: ignore[method-assign]


if __name__ == "__main__":
    own_this_process()
    sys.exit(main())
