"""torchrun wrapper for jobs started by the driver: `python -m launcher.launch.torchrun_agent TORCHRUN-ARGUMENTS`.

Its rendezvous store listens on the loopback interface only (torch's own listens on all interfaces). The agent dies with
its driver and does not print its own failure report, because the driver prints the first root error.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence

from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.system.processes import die_with_parent

__all__ = ["main"]

FAILURES_FLAG = "--failures="


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun with `argv`; a leading `--failures=FILE` names the file for the exit codes of failed ranks."""
    die_with_parent()
    argv = list(sys.argv[1:] if argv is None else argv)
    report = argv.pop(0).removeprefix(FAILURES_FLAG) if argv and argv[0].startswith(FAILURES_FLAG) else ""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)  # the driver receives these and signals the workers itself

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from launcher.distributed.rendezvous import make_loopback_store

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    store = make_loopback_store(0, serve=True)
    rendezvous_options = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{store.port}", "--rdzv-conf=is_host=0"]
    try:
        run.main([*rendezvous_options, *argv])
    except ChildFailedError as error:
        if report:
            failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
            with open(report, "w") as file:
                json.dump(failed, file)
        return EXIT_FAILED
    except SignalException:
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
