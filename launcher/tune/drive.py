"""`tune` from the command line: the driver starts the workers in a private folder, of which nothing is left."""

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
from launcher.errors import EXIT_AGAIN, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.keys import from_mapping, to_mapping
from launcher.launch import command, in_memory, killed, tell, unmeasured, workers_of
from launcher.observed import noise_of
from launcher.process import children, die_with_parent
from launcher.settings import Run
from launcher.sinks.text import printable
from launcher.topology import Topology
from launcher.tune.auto import Unmeasured, stood_in
from launcher.tune.worth import worth

__all__ = [
    "LOST",
    "RESULT",
    "STATE",
    "after_loss",
    "checked",
    "drive",
    "found",
    "interruptible",
    "keep",
    "main",
    "main_handover",
    "shown",
    "valued",
    "why",
]

LOOK_EVERY_S = 0.05
RESULT, STATE, LOST = "result.json", "state.json", "lost"


def drive(run: Run) -> int:
    """Measure with `launch.workers` processes on this machine, and say what was found.

    Raises:
        RequestError: the request is wrong.
    """
    workers, run = checked(run)
    if run.launch.dry:
        print(command(run, workers, Path("HANDOVER.json"), Path("FAILURES.json"), "probe").line())
        return EXIT_OK
    try:
        shown(found(run, workers), run)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Unmeasured as error:
        return unmeasured(error, run)
    return EXIT_OK


def checked(run: Run) -> tuple[int, Run]:
    """How many workers measure, and what.

    Raises:
        RequestError: the request is wrong; nothing was started.
    """
    from launcher.study import study

    workers, run = workers_of(run), stood_in(run)
    noise_of(run)  # refused now rather than after measuring
    study(run, recipes.sizes(recipes.build(run.recipe)), workers)
    return workers, run


def found(run: Run, workers: int, *, look: bool = False) -> dict[str, Any]:
    """The document that workers of this machine come to; with `look` the kept one, where there is one.

    Raises:
        RequestError: the request is wrong.
        Unmeasured: a worker failed.
        KeyboardInterrupt: SIGTERM or Ctrl-C came; all is cleared away.
    """
    with tempfile.TemporaryDirectory(prefix="launcher-tune-") as private:
        return _started(run, workers, Path(private), look)


def _started(run: Run, workers: int, private: Path, look: bool) -> dict[str, Any]:
    report = private / "failures.json"
    handover = in_memory(json.dumps({"run": to_mapping(run), "private": str(private), "look": look}))
    started = command(run, workers, Path(f"/proc/{os.getpid()}/fd/{handover}"), report, "probe")
    with interruptible():
        agent = subprocess.Popen(started.argv, env=os.environ | started.env, stdout=2, start_new_session=True)
        try:
            return _watched(agent, private, report)
        finally:
            _end(agent)
            os.close(handover)


def _watched(agent: subprocess.Popen[bytes], private: Path, report: Path) -> dict[str, Any]:
    """Until the agent ends, or a worker has failed for another reason than memory."""
    while agent.poll() is None and not any(failure.those(private)):
        try:
            agent.wait(LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            continue
    if agent.returncode == 0:
        document: dict[str, Any] = json.loads((private / RESULT).read_text())
        return document
    _end(agent)
    first = failure.first(private, 0)
    raise Unmeasured(killed(report)) if first is None else why(first)


def why(first: failure.Failure) -> Exception:
    """What to raise for a worker's last word."""
    if first.status == EXIT_REQUEST:
        return RequestError(first.message)
    at = f" in {first.where}" if first.where else ""
    line = first.message if first.final else f"rank {first.rank} failed{at}: {first.type}: {first.message}"
    return Unmeasured(line, first.traceback)


def _end(agent: subprocess.Popen[bytes]) -> None:
    """The workers die with their agent."""
    if agent.poll() is None:
        pids = children(agent.pid)
        agent.kill()
        agent.wait()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does: workers and folder are cleared away."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def shown(found: Mapping[str, Any], run: Run) -> None:
    """On stdout as a table or as one JSON document, and where `tune.out` says into files."""
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
    """With what its sizes are worth, where the noise scale is known."""
    return {**found, "goodput": worth(found, noise_of(run), run.lr.base_batch)}


def keep(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into the folder that tune.out names, or below it.

    Raises:
        RequestError: it cannot be written into.
    """
    try:
        private_folder(folder)
        for name, text in texts.items():
            write_whole(folder / name, text)
    except OSError as problem:
        raise RequestError(f"tune.out={folder} cannot be written ({problem.strerror}): type another") from problem


# --- a worker -------------------------------------------------------------------------------------------------------


def main(run: Callable[[], Run], topology: Topology) -> int:
    """A rank under a torchrun of the user's own: rank 0 composes and prints."""
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


def main_handover(path: str, topology: Topology) -> int:
    """A rank under the driver's agent, or beside a worker. What is wrong is written down for those to tell."""
    from launcher.tune.probe import Lost

    die_with_parent()
    facts = json.loads(Path(path).read_text())
    private = Path(facts["private"])
    topology = topology.started(topology.restarts + 1)
    try:
        return _probe(facts, topology, private)
    except Lost:
        (private / f"{LOST}-{topology.generation}").touch()
        os._exit(EXIT_AGAIN)  # the others see that it has gone, and all are started again
    except Exception as error:
        if failure.consequence(str(error)):
            os._exit(EXIT_AGAIN)
        final = isinstance(error, RequestError)
        failure.record(private, topology.rank, topology.generation, error, private, final=final)
        return EXIT_REQUEST if final else EXIT_FAILED


def _probe(facts: Mapping[str, Any], topology: Topology, private: Path) -> int:
    from launcher.tune.session import Earlier, measured

    run, state = from_mapping(facts["run"]), private / STATE
    earlier = Earlier.from_facts(facts["earlier"]) if facts.get("earlier") else _earlier(topology, private)
    store = _met(facts.get("prefix"), topology, run.launch.timeout_s)
    found = measured(run, topology, store, earlier, state if topology.rank == 0 else None, look=facts["look"])
    if topology.rank == 0:
        (private / RESULT).write_text(json.dumps(found))
    return EXIT_OK


def _met(prefix: str | None, topology: Topology, timeout_s: float) -> Any:
    """A store of our own on the loopback, or beside a worker a part of its job's."""
    from torch.distributed import PrefixStore

    from launcher import rendezvous

    if prefix is not None:
        return PrefixStore(prefix, rendezvous.meet(topology, loopback=False, timeout_s=timeout_s))
    store = rendezvous.meet(topology, loopback=True, timeout_s=timeout_s)
    return rendezvous.gathered(store, topology, "", timeout_s)[1]


def _earlier(topology: Topology, private: Path) -> Any:
    """What is known already where the workers were started again: the size under way then does not fit.

    Raises:
        RuntimeError: they were started again for another reason, a worker that was killed.
    """
    from launcher.tune.session import Earlier

    state = private / STATE
    if topology.generation == 1 or not state.exists():
        return Earlier()
    facts = json.loads(state.read_text())
    if not (private / f"{LOST}-{topology.generation - 1}").exists():
        raise RuntimeError(f"a worker was killed while per_device={facts['trying']} was measured: out of memory?")
    return Earlier.from_facts(after_loss(facts))


def after_loss(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a survey wrote down, with the size under way, if one was, as one that memory ran out at."""
    from launcher.tune.ledger import Ledger, Visit

    ledger = Ledger.from_facts(facts["ledger"])
    if facts["trying"] is not None:
        ledger = ledger.plus(Visit(facts["trying"], where="a collective"))
    return {"ledger": ledger.to_facts(), "spent_s": facts["spent_s"]}


@contextmanager
def to_stderr() -> Iterator[None]:
    """What a recipe prints must not get into the document: stdout is stderr for as long."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(own, 1)
        os.close(own)
