"""`tune` from the command line: the driver starts the workers in a temporary folder, which is removed afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import failure
from launcher import recipe as recipes
from launcher.durable import private_folder, write_whole
from launcher.errors import EXIT_INTERRUPTED, EXIT_OK, RequestError
from launcher.keys import from_mapping, to_mapping
from launcher.launch import in_memory, probing, tell, unmeasured, workers_of
from launcher.observed import noise_of
from launcher.process import die_with_parent, end
from launcher.settings import Run
from launcher.sinks.text import printable
from launcher.topology import Topology
from launcher.tune.auto import Unmeasured, stood_in
from launcher.tune.host import OUTCOME
from launcher.tune.worth import worth

__all__ = [
    "checked",
    "drive",
    "found",
    "interruptible",
    "keep",
    "main",
    "shown",
    "valued",
]


def drive(run: Run) -> int:
    """Measure with `launch.workers` processes on this machine and print the result.

    Raises:
        RequestError: the request is wrong.
    """
    workers, run = checked(run)
    if run.launch.dry:
        print(probing(run, workers, Path("HANDOVER.json")).line())
        return EXIT_OK
    try:
        shown(found(run, workers), run)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Unmeasured as error:
        return unmeasured(error, run)
    return EXIT_OK


def checked(run: Run) -> tuple[int, Run]:
    """Validate the request; return the number of workers and the configuration to measure.

    Raises:
        RequestError: the request is wrong; nothing was started.
    """
    from launcher.study import study

    workers, run = workers_of(run), stood_in(run)
    noise_of(run)  # rejects a wrong plan.noise before measuring
    study(run, recipes.sizes(recipes.build(run.recipe)), workers)
    return workers, run


def found(run: Run, workers: int, *, look: bool = False) -> dict[str, Any]:
    """Measure with workers on this machine and return the document; with `look`, a cached document if there is one.

    Raises:
        RequestError: the request is wrong.
        Unmeasured: a worker failed.
        KeyboardInterrupt: SIGTERM or Ctrl-C was received; workers and temporary files have been removed.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-tune-") as private:
        return _started(run, workers, Path(private), look)


def _started(run: Run, workers: int, private: Path, look: bool) -> dict[str, Any]:
    handover = in_memory(json.dumps({"run": to_mapping(run), "private": str(private), "look": look}))
    started = probing(run, workers, Path(f"/proc/{os.getpid()}/fd/{handover}"))
    with interruptible():
        host = subprocess.Popen(started.argv, env=os.environ | started.env, stdout=2, start_new_session=True)
        try:
            host.wait()
            return _outcome(private / OUTCOME, host.returncode)
        finally:
            end(host)
            os.close(handover)


def _outcome(file: Path, status: int) -> dict[str, Any]:
    """Read the result that the measuring process left.

    Raises:
        RequestError, Unmeasured: as `found`.
    """
    if not file.exists():
        raise Unmeasured(failure.left("the process that starts the measuring ranks", status))
    outcome = json.loads(file.read_text())
    if "request" in outcome:
        raise RequestError(outcome["request"])
    if "unmeasured" in outcome:
        raise Unmeasured(outcome["unmeasured"], outcome["trace"])
    document: dict[str, Any] = outcome["found"]
    return document


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM and a closed terminal like Ctrl-C, so that workers and the temporary folder are removed."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shown(found: Mapping[str, Any], run: Run) -> None:
    """Print the result to stdout, as a table or one JSON document, and write files if `tune.out` is set."""
    for line in found["said"]:
        tell(f"note: {line}")
    found = valued(found, run)
    from launcher.tune.page import page
    from launcher.tune.words import text

    if run.format == "json":
        print(json.dumps(found))
    else:
        written = text(found)
        print(printable(written, sys.stdout), end="")
    if run.tune.out is not None:
        folder = Path(run.tune.out)
        keep(folder, {"tune.json": json.dumps(found, indent=1) + "\n", "tune.html": page(found)})
        tell(f"written: {folder / 'tune.json'}, {folder / 'tune.html'}")


def valued(found: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """The document with the goodput of its sizes, where the noise scale is known."""
    return {**found, "goodput": worth(found, noise_of(run), run.lr.base_batch)}


def keep(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into `folder`, which is tune.out or below it.

    Raises:
        RequestError: the folder cannot be written.
    """
    try:
        private_folder(folder)
        for name, text in texts.items():
            write_whole(folder / name, text)
    except OSError as problem:
        why = f"tune.out={folder} cannot be written ({problem.strerror}): type another folder"
        raise RequestError(why) from problem


# --- a worker -------------------------------------------------------------------------------------------------------


def main(run: Callable[[], Run], topology: Topology) -> int:
    """Run one rank under the user's own torchrun: rank 0 composes the configuration and prints the result."""
    from launcher import rendezvous

    die_with_parent()
    composed = run() if topology.rank == 0 else None
    timeout_s = composed.launch.timeout_s if composed else 600.0
    store = rendezvous.meet(topology, loopback=False, timeout_s=timeout_s)
    _, store = rendezvous.gathered(store, topology, "", timeout_s)
    text = None if composed is None else json.dumps(to_mapping(composed))
    text = rendezvous.handed(store, text)
    asked = stood_in(composed or from_mapping(json.loads(text)))
    from launcher.tune.session import measured

    with to_stderr():
        found = measured(asked, topology.started(1), store)
    if topology.rank == 0:
        shown(found, asked)
    return EXIT_OK


@contextmanager
def to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, so that output of the recipe does not mix with the document."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)
