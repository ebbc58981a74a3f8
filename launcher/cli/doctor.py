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

from launcher.cli import machine_checks
from launcher.cli.machine_checks import CheckResult, TorchInfo
from launcher.errors import EXIT_FAILED, EXIT_OK, UsageError
from launcher.run_dir.failures import describe_exit
from launcher.run_dir.metrics_reader import read_run_metrics
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.formatting import (
    Style,
    encodable,
    format_duration,
    format_plural,
    strip_control_characters,
    wrap_text,
)
from launcher.system.gpus import count_gpus

__all__ = ["run_checks"]

DISTRIBUTION_NAME = "elastic-batch-launcher"
ACCEPTED_WORDS = ("format=json", "format=text", "debug=true")  # debug=true because error messages advise it
CHECK_TEXT_WIDTH, RED, GREEN = 80, 31, 32

JOB_TIMEOUT_S = 180.0
JOB_UPDATES = 8
JOB_OVERRIDES = (
    "recipe=mlp",
    "launch.workers=2",
    "sink=[]",
    f"train.duration={JOB_UPDATES}ba",
    "elastic.max_restarts=0",
)
#: The hint at the end of an error line; dropped, since the logs are deleted with the job's folder.
LOG_HINT_PATTERN = re.compile(r" \((logs?: .*|debug=true shows where)\)$")


def run_checks(args: Sequence[str]) -> int:
    """Run all checks and print them to stdout, with format=json as one document; return the exit status.

    Raises:
        UsageError: an argument is not known to doctor.
    """
    for word in args:
        if word not in ACCEPTED_WORDS:
            raise UsageError(
                f"{word} is not an argument of doctor: type launcher doctor, or launcher doctor format=json"
            )
    as_json = "format=json" in args
    stream, found = sys.stderr if as_json else sys.stdout, []
    style = Style.from_stream(stream)
    for check in iter_checks(Path.cwd()):
        found.append(check)
        print(encodable(format_check(check, style), stream), file=stream, flush=True)
    failed = sum(not check.ok for check in found)
    told = f"{failed} of {format_plural(len(found), 'check')} failed" if failed else "all required checks passed"
    print(f"\n{style(told, RED if failed else GREEN)}", file=stream, flush=True)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}))
    return EXIT_FAILED if failed else EXIT_OK


def format_check(check: CheckResult, style: Style) -> str:
    """Format a check in lines of at most 80 columns; a failed one is followed by its fix."""
    mark = "ok" if check.ok else "FAIL"
    head = f"{mark:<4} {check.name:<11}  "
    first, *rest = wrap_text(head + strip_control_characters(check.detail), CHECK_TEXT_WIDTH, len(head))
    if check.fix:
        rest += wrap_text(f"{'':<5}{'fix:':<11}  {strip_control_characters(check.fix)}", CHECK_TEXT_WIDTH, len(head))
    return "\n".join([first.replace(mark, style(mark, GREEN if check.ok else RED), 1), *rest])


def iter_checks(here: Path) -> Iterator[CheckResult]:
    """Yield all checks in the order in which to fix them; the job, which depends on the others, comes last."""
    asked = declared_requirements()
    seen = machine_checks.inspect_torch_in_subprocess(here, "torch" + asked[""]["torch"])
    yield check_version(
        "python", ".".join(map(str, sys.version_info[:3])), metadata(DISTRIBUTION_NAME)["Requires-Python"]
    )
    yield check_packages({name: bounds for name, bounds in asked[""].items() if name != "torch"})
    if isinstance(seen, TorchInfo):
        yield check_version("torch", seen.version, asked[""]["torch"])
        yield machine_checks.check_gpus(seen, count_gpus())
        yield machine_checks.check_backends(seen)
    else:
        yield seen
    for name, host in (("loopback", "127.0.0.1"), ("localhost", "localhost"), ("host name", socket.gethostname())):
        yield machine_checks.check_address(name, host)
    yield machine_checks.check_shared_memory(machine_checks.SHM_PATH)
    yield machine_checks.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield machine_checks.check_cores(
        len(os.sched_getaffinity(0)), machine_checks.cgroup_cpu_limit(machine_checks.CPU_MAX_PATH), os.environ
    )
    yield machine_checks.check_run_folder(here / "runs" if (here / "runs").is_dir() else here)
    yield machine_checks.check_wandb(os.environ)
    yield machine_checks.check_slurm()
    yield from (check_optional_extra(name, needs) for name, needs in asked.items() if name not in ("", "dev"))
    yield check_training_job(
        JOB_OVERRIDES if isinstance(seen, TorchInfo) and seen.gpus > 1 else (*JOB_OVERRIDES, "train.device=cpu"),
        JOB_TIMEOUT_S,
    )


# --- installed packages -------------------------------------------------------------------------------------------


def declared_requirements() -> Mapping[str, dict[str, str]]:
    """Return the version bounds of pyproject.toml by extra and package; the extra "" holds the required packages."""
    found: dict[str, dict[str, str]] = {}
    for line in requires(DISTRIBUTION_NAME) or ():
        need, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", need)[0]
        found.setdefault(marker.partition("extra ==")[2].strip(" '\""), {})[name] = need[len(name) :].strip()
    return found


def version_satisfies(have: str, bounds: str) -> bool:
    """Whether a version such as 2.13.0+cpu satisfies bounds such as `>=2.8,<3`."""
    holds = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    return all(
        holds[sign](parse_release(have), parse_release(to)) for sign, to in re.findall(r"(>=|<|==)\s*([\d.]+)", bounds)
    )


def parse_release(version: str) -> tuple[int, ...]:
    return tuple(map(int, [*re.findall(r"\d+", version.partition("+")[0]), 0, 0][:3]))


def get_installed_version(name: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check_version(name: str, have: str, bounds: str) -> CheckResult:
    mend = (
        f"make env PYTHON=python3.12, or any version {bounds}" if name == "python" else f"pip install '{name}{bounds}'"
    )
    return (
        CheckResult(name, True, have)
        if version_satisfies(have, bounds)
        else CheckResult(name, False, f"{have} is not {bounds}", mend)
    )


def check_packages(needed: Mapping[str, str]) -> CheckResult:
    wrong = [
        name for name, bounds in needed.items() if not version_satisfies(get_installed_version(name) or "0", bounds)
    ]
    told = ", ".join(f"{name} {get_installed_version(name) or 'is not installed'}" for name in wrong)
    mend = " ".join(["pip install", *(f"'{name}{needed[name]}'" for name in wrong)])
    return (
        CheckResult("packages", False, told, mend)
        if wrong
        else CheckResult("packages", True, f"{len(needed)} required packages installed")
    )


def check_optional_extra(name: str, needs: Mapping[str, str]) -> CheckResult:
    """Check an optional extra; it is listed under the name of its last package."""
    *_, title = needs
    have, install = get_installed_version(title), f"pip install '{DISTRIBUTION_NAME}[{name}]'"
    if not all(map(get_installed_version, needs)):
        return CheckResult(title, True, f"not installed: {install}")
    return CheckResult(
        title, True, have if version_satisfies(have, needs[title]) else f"{have} is not {needs[title]}: {install}"
    )


# --- a real training job ------------------------------------------------------------------------------------------


def check_training_job(job: Sequence[str], within_s: float) -> CheckResult:
    """Train a few updates with two processes, started by the driver as usual; all files are removed afterwards."""
    began_s = time.monotonic()
    try:
        why = run_smoke_job(job, within_s)
    except OSError as problem:
        return CheckResult("smoke job", False, str(problem), "export TMPDIR=/a/folder/that/can/be/written")
    if why:
        return CheckResult("smoke job", False, why, shlex.join(["launcher", *job, "debug=true"]))
    return CheckResult(
        "smoke job", True, f"2 workers trained {JOB_UPDATES} updates in {format_duration(time.monotonic() - began_s)}"
    )


def run_smoke_job(job: Sequence[str], within_s: float) -> str:
    """Run the job and describe what went wrong; empty on success."""
    from launcher.system.processes import kill_process_tree
    from launcher.system.signal_handlers import sigterm_as_keyboard_interrupt

    argv = [sys.executable, "-m", "launcher", *job, "run.name=smoke"]
    folder = tempfile.TemporaryDirectory(prefix="launcher-doctor-", ignore_cleanup_errors=True)
    with sigterm_as_keyboard_interrupt(), folder as place, (Path(place) / "said").open("wb") as said:
        env = os.environ | {"TMPDIR": place}  # a killed driver leaves its temporary files there
        driver = subprocess.Popen(argv, cwd=place, env=env, stdout=said, stderr=said, start_new_session=True)
        try:
            driver.wait(within_s)
        except subprocess.TimeoutExpired:
            return f"the job did not finish within {format_duration(within_s)} and was killed"
        finally:
            kill_process_tree(driver)
        return diagnose_job(Path(place), driver.returncode)


def diagnose_job(place: Path, status: int) -> str:
    """Describe what is wrong with a job that ended in `place`; empty if both workers trained it to the end."""
    if status != EXIT_OK:
        lines = (place / "said").read_text(errors="replace").splitlines()
        errors = [
            LOG_HINT_PATTERN.sub("", line.removeprefix("error: ")) for line in lines if line.startswith("error: ")
        ]
        first, last = (errors[0], errors[-1]) if errors else ("", describe_exit("the driver", status))
        return (
            f"{last}: {first}" if first not in last else last
        )  # the first error is from a worker without a failure record
    run = RunDirectory(place / "runs" / "smoke")
    try:
        worlds = {row.get("world") for row in read_run_metrics(str(run.path)).rows}
        done = run.read_done()
    except UsageError as error:
        return str(error)
    if worlds != {2} or done is None:
        return f"the job trained with world sizes {worlds} instead of 2" if done else "the job ended without done.json"
    return ""
