"""`launcher doctor`: check what commonly fails on a new machine, then run a small two-process training job.

Nothing is left behind, and the only network lookup is this machine's own name. Absent optional packages are reported
but are not failures.
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
WORDS = ("format=json", "format=text", "debug=true")  # debug=true because error messages advise it
COLUMNS, RED, GREEN = 80, 31, 32

JOB_S = 180.0
UPDATES = 8
JOB = ("recipe=mlp", "launch.workers=2", "sink=[]", f"train.duration={UPDATES}ba", "elastic.max_restarts=0")
#: The hint at the end of an error line; dropped, since the logs are deleted with the job's folder.
HINT = re.compile(r" \((logs?: .*|debug=true shows where)\)$")


def doctor(args: Sequence[str]) -> int:
    """Run all checks and print them to stdout, with format=json as one document; return the exit status.

    Raises:
        UsageError: an argument is not known to doctor.
    """
    for word in args:
        if word not in WORDS:
            raise RequestError(
                f"{word} is not an argument of doctor: type launcher doctor, or launcher doctor format=json"
            )
    as_json = "format=json" in args
    stream, found = sys.stderr if as_json else sys.stdout, []
    paint = Paint.of(stream)
    for check in checks(Path.cwd()):
        found.append(check)
        print(printable(text(check, paint), stream), file=stream, flush=True)
    failed = sum(not check.ok for check in found)
    told = f"{failed} of {plural(len(found), 'check')} failed" if failed else "all required checks passed"
    print(f"\n{paint(told, RED if failed else GREEN)}", file=stream, flush=True)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}))
    return EXIT_FAILED if failed else EXIT_OK


def text(check: Check, paint: Paint) -> str:
    """Format a check in lines of at most 80 columns; a failed one is followed by its fix."""
    mark = "ok" if check.ok else "FAIL"
    head = f"{mark:<4} {check.name:<11}  "
    first, *rest = fold(head + one_line(check.detail), COLUMNS, len(head))
    if check.mend:
        rest += fold(f"{'':<5}{'fix:':<11}  {one_line(check.mend)}", COLUMNS, len(head))
    return "\n".join([first.replace(mark, paint(mark, GREEN if check.ok else RED), 1), *rest])


def checks(here: Path) -> Iterator[Check]:
    """Yield all checks in the order in which to fix them; the job, which depends on the others, comes last."""
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


# --- installed packages -------------------------------------------------------------------------------------------


def wanted() -> Mapping[str, dict[str, str]]:
    """Return the version bounds of pyproject.toml by extra and package; the extra "" holds the required packages."""
    found: dict[str, dict[str, str]] = {}
    for line in requires(NAME) or ():
        need, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", need)[0]
        found.setdefault(marker.partition("extra ==")[2].strip(" '\""), {})[name] = need[len(name) :].strip()
    return found


def within(have: str, bounds: str) -> bool:
    """Whether a version such as 2.13.0+cpu satisfies bounds such as `>=2.8,<3`."""
    holds = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    return all(holds[sign](release(have), release(to)) for sign, to in re.findall(r"(>=|<|==)\s*([\d.]+)", bounds))


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, [*re.findall(r"\d+", version.partition("+")[0]), 0, 0][:3]))


def installed(name: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def bounded(name: str, have: str, bounds: str) -> Check:
    mend = (
        f"make env PYTHON=python3.12, or any version {bounds}" if name == "python" else f"pip install '{name}{bounds}'"
    )
    return Check(name, True, have) if within(have, bounds) else Check(name, False, f"{have} is not {bounds}", mend)


def packages(needed: Mapping[str, str]) -> Check:
    wrong = [name for name, bounds in needed.items() if not within(installed(name) or "0", bounds)]
    told = ", ".join(f"{name} {installed(name) or 'is not installed'}" for name in wrong)
    mend = " ".join(["pip install", *(f"'{name}{needed[name]}'" for name in wrong)])
    return (
        Check("packages", False, told, mend)
        if wrong
        else Check("packages", True, f"{len(needed)} required packages installed")
    )


def extra(name: str, needs: Mapping[str, str]) -> Check:
    """Check an optional extra; it is listed under the name of its last package."""
    *_, title = needs
    have, install = installed(title), f"pip install '{NAME}[{name}]'"
    if not all(map(installed, needs)):
        return Check(title, True, f"not installed: {install}")
    return Check(title, True, have if within(have, needs[title]) else f"{have} is not {needs[title]}: {install}")


# --- a real training job ------------------------------------------------------------------------------------------


def smoke(job: Sequence[str], within_s: float) -> Check:
    """Train a few updates with two processes, started by the driver as usual; all files are removed afterwards."""
    began_s = time.monotonic()
    try:
        why = ran(job, within_s)
    except OSError as problem:
        return Check("smoke job", False, str(problem), "export TMPDIR=/a/folder/that/can/be/written")
    if why:
        return Check("smoke job", False, why, shlex.join(["launcher", *job, "debug=true"]))
    return Check("smoke job", True, f"2 workers trained {UPDATES} updates in {took(time.monotonic() - began_s)}")


def ran(job: Sequence[str], within_s: float) -> str:
    """Run the job and describe what went wrong; empty on success."""
    from launcher.process import end
    from launcher.tune.drive import interruptible

    argv = [sys.executable, "-m", "launcher", *job, "run.name=smoke"]
    folder = tempfile.TemporaryDirectory(prefix="launcher-doctor-", ignore_cleanup_errors=True)
    with interruptible(), folder as place, (Path(place) / "said").open("wb") as said:
        env = os.environ | {"TMPDIR": place}  # a killed driver leaves its temporary files there
        driver = subprocess.Popen(argv, cwd=place, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            driver.wait(within_s)
        except subprocess.TimeoutExpired:
            return f"the job did not finish within {took(within_s)} and was killed"
        finally:
            end(driver)
        return amiss(Path(place), driver.returncode)


def amiss(place: Path, status: int) -> str:
    """Describe what is wrong with a job that ended in `place`; empty if both workers trained it to the end."""
    if status != EXIT_OK:
        lines = (place / "said").read_text(errors="replace").splitlines()
        errors = [HINT.sub("", line.removeprefix("error: ")) for line in lines if line.startswith("error: ")]
        first, last = (errors[0], errors[-1]) if errors else ("", left("the driver", status))
        return (
            f"{last}: {first}" if first not in last else last
        )  # the first error is from a worker without a failure record
    run = RunFolder(place / "runs" / "smoke")
    try:
        worlds = {row.get("world") for row in history(str(run.path)).rows}
        done = run.read_done()
    except RequestError as error:
        return str(error)
    if worlds != {2} or done is None:
        return f"the job trained with world sizes {worlds} instead of 2" if done else "the job ended without done.json"
    return ""
