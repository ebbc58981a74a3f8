"""`launcher doctor`: is this machine fit to train? What goes wrong on a new one, looked at; then a small job for real.

Nothing is kept, and nothing but this machine's own name is looked up in the network. What is optional and absent is
told, and is no failure.
"""

from __future__ import annotations

import json
import operator
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from launcher import machine
from launcher.errors import EXIT_FAILED, EXIT_OK, RequestError
from launcher.failure import left
from launcher.gpus import count_gpus
from launcher.history import history
from launcher.machine import Check, Seen
from launcher.runfolder import RunFolder
from launcher.sinks.text import Paint, fold, one_line, plural, printable, took

__all__ = ["doctor"]

NAME = "elastic-batch-launcher"
WORDS = ("format=json", "format=text", "debug=true")  # the last one as an error's line advises
COLUMNS, RED, GREEN = 80, 31, 32

JOB_S = 180.0
UPDATES = 8
JOB = ("recipe=mlp", "launch.workers=2", "sink=[]", f"train.duration={UPDATES}ba", "elastic.max_restarts=0")
#: What an error's line says of logs, which are gone with the job's folder, and of what to type.
HINT = re.compile(r" \((logs?: .*|debug=true shows where)\)$")


def doctor(args: Sequence[str]) -> int:
    """Look at everything and say it on stdout, with format=json as one document; returns the exit status.

    Raises:
        RequestError: a word that means nothing here.
    """
    for word in args:
        if word not in WORDS:
            raise RequestError(f"{word} means nothing to doctor: type launcher doctor, or launcher doctor format=json")
    as_json = "format=json" in args
    stream, found = sys.stderr if as_json else sys.stdout, []
    paint = Paint.of(stream)
    for check in checks(Path.cwd()):
        found.append(check)
        print(printable(text(check, paint), stream), file=stream, flush=True)
    failed = sum(not check.ok for check in found)
    told = f"{failed} of {plural(len(found), 'check')} failed" if failed else "all that is needed is fine"
    print(f"\n{paint(told, RED if failed else GREEN)}", file=stream, flush=True)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}))
    return EXIT_FAILED if failed else EXIT_OK


def text(check: Check, paint: Paint) -> str:
    """Lines of at most 80 columns; below a failed check what to type."""
    mark = "ok" if check.ok else "FAIL"
    head = f"{mark:<4} {check.name:<11}  "
    first, *rest = fold(head + one_line(check.detail), COLUMNS, len(head))
    if check.mend:
        rest += fold(f"{'':<5}{'mend:':<11}  {one_line(check.mend)}", COLUMNS, len(head))
    return "\n".join([first.replace(mark, paint(mark, GREEN if check.ok else RED), 1), *rest])


def checks(here: Path) -> Iterator[Check]:
    """All of them, in the order in which one would mend them; the job, which needs the rest, is the last."""
    asked = wanted()
    seen = machine.ask_torch(here, "torch" + asked[""]["torch"])
    yield bounded("python", ".".join(map(str, sys.version_info[:3])), metadata(NAME)["Requires-Python"])
    yield packages({name: bounds for name, bounds in asked[""].items() if name != "torch"})
    if isinstance(seen, Seen):
        yield bounded("torch", seen.version, asked[""]["torch"])
        yield machine.gpus(seen, count_gpus())
        yield machine.backends(seen)
    else:
        yield seen
    for name, host in (("loopback", "127.0.0.1"), ("localhost", "localhost"), ("host name", socket.gethostname())):
        yield machine.address(name, host)
    yield machine.shared_memory(machine.SHM)
    yield machine.open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield machine.cores(len(os.sched_getaffinity(0)), machine.granted(machine.CPU_MAX), os.environ)
    yield machine.folder(here / "runs" if (here / "runs").is_dir() else here)
    yield machine.wandb(os.environ)
    yield machine.slurm()
    yield from (extra(name, needs) for name, needs in asked.items() if name not in ("", "dev"))
    yield smoke(JOB if isinstance(seen, Seen) and seen.gpus > 1 else (*JOB, "train.device=cpu"), JOB_S)


# --- what is installed --------------------------------------------------------------------------------------------


def wanted() -> Mapping[str, dict[str, str]]:
    """The bounds of each package as pyproject.toml has them, by the extra that wants it; "" for what is required."""
    found: dict[str, dict[str, str]] = {}
    for line in requires(NAME) or ():
        need, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", need)[0]
        found.setdefault(marker.partition("extra ==")[2].strip(" '\""), {})[name] = need[len(name) :].strip()
    return found


def within(have: str, bounds: str) -> bool:
    """Whether a version such as 2.13.0+cpu is within bounds such as `>=2.8,<3`."""
    holds = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    return all(holds[sign](release(have), release(to)) for sign, to in re.findall(r"(>=|<|==)\s*([\d.]+)", bounds))


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, [*re.findall(r"\d+", version.partition("+")[0]), 0, 0][:3]))


def installed(name: str) -> str:
    """Its version, or nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def bounded(name: str, have: str, bounds: str) -> Check:
    mend = f"make env PYTHON=python3.12, or any {bounds}" if name == "python" else f"pip install '{name}{bounds}'"
    return Check(name, True, have) if within(have, bounds) else Check(name, False, f"{have} is not {bounds}", mend)


def packages(needed: Mapping[str, str]) -> Check:
    wrong = [name for name, bounds in needed.items() if not within(installed(name) or "0", bounds)]
    told = ", ".join(f"{name} {installed(name) or 'is not installed'}" for name in wrong)
    mend = " ".join(["pip install", *(f"'{name}{needed[name]}'" for name in wrong)])
    return Check("packages", False, told, mend) if wrong else Check("packages", True, f"{len(needed)} as required")


def extra(name: str, needs: Mapping[str, str]) -> Check:
    """What is optional goes by the last package of its extra."""
    *_, title = needs
    have, install = installed(title), f"pip install '{NAME}[{name}]'"
    if not all(map(installed, needs)):
        return Check(title, True, f"not installed: {install}")
    return Check(title, True, have if within(have, needs[title]) else f"{have} is not {needs[title]}: {install}")


# --- a job for real -----------------------------------------------------------------------------------------------


def smoke(job: Sequence[str], within_s: float) -> Check:
    """Two processes train for a few updates, started by the driver as anyone's are; all of it is gone afterwards."""
    began_s = time.monotonic()
    try:
        why = ran(job, within_s)
    except OSError as problem:
        return Check("smoke job", False, str(problem), "export TMPDIR=/a/folder/that/can/be/written")
    if why:
        return Check("smoke job", False, why, shlex.join(["launcher", *job, "debug=true"]))
    return Check("smoke job", True, f"2 workers trained {UPDATES} updates in {took(time.monotonic() - began_s)}")


def ran(job: Sequence[str], within_s: float) -> str:
    """What went wrong with it; nothing where all is well."""
    from launcher.process import end
    from launcher.tune.drive import interruptible

    argv = [sys.executable, "-m", "launcher", *job, "run.name=smoke"]
    folder = tempfile.TemporaryDirectory(prefix="launcher-doctor-", ignore_cleanup_errors=True)
    with interruptible(), folder as place, (Path(place) / "said").open("wb") as said:
        env = os.environ | {"TMPDIR": place}  # what a driver that is killed leaves there
        driver = subprocess.Popen(argv, cwd=place, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            driver.wait(within_s)
        except subprocess.TimeoutExpired:
            return f"the job was not over after {took(within_s)}, and was ended"
        finally:
            end(driver)
        return amiss(Path(place), driver.returncode)


def amiss(place: Path, status: int) -> str:
    """What is wrong with a job that ended in `place`; nothing where both workers trained it to its end."""
    if status != EXIT_OK:
        lines = (place / "said").read_text(errors="replace").splitlines()
        errors = [HINT.sub("", line.removeprefix("error: ")) for line in lines if line.startswith("error: ")]
        first, last = (errors[0], errors[-1]) if errors else ("", left("the driver", status))
        return f"{last}: {first}" if first not in last else last  # of a worker that could write nothing down
    run = RunFolder(place / "runs" / "smoke")
    try:
        worlds = {row.get("world") for row in history(str(run.path)).rows}
        done = run.read_done()
    except RequestError as error:
        return str(error)
    if worlds != {2} or done is None:
        return f"its updates were made by {worlds} workers" if done else "it ended without done.json"
    return ""
