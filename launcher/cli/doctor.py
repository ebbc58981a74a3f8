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
from launcher.system.processes import count_cores
from launcher.topology import Topology

__all__ = ["run_checks", "run_doctor"]

DISTRIBUTION_NAME = "elastic-batch-launcher"
ACCEPTED_ARGUMENTS = ("format=json", "format=text", "debug=true")  # debug=true because error messages advise it
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


def run_doctor(args: Sequence[str]) -> int:
    """Check this machine, ending with a two-process job; exit 1 if a required check fails."""
    if Topology.from_env() is not None:
        raise UsageError("doctor starts a job of its own: type launcher doctor, without torchrun")
    return run_checks(args)


def run_checks(args: Sequence[str]) -> int:
    """Run all checks and print them to stdout, with format=json as one document; return the exit status.

    Raises:
        UsageError: an argument is not known to doctor.
    """
    for arg in args:
        if arg not in ACCEPTED_ARGUMENTS:
            raise UsageError(
                f"{arg} is not an argument of doctor: type launcher doctor, or launcher doctor format=json"
            )
    as_json = "format=json" in args
    stream, results = sys.stderr if as_json else sys.stdout, []
    style = Style.from_stream(stream)
    for check in iter_checks(Path.cwd()):
        results.append(check)
        print(encodable(format_check(check, style), stream), file=stream, flush=True)
    failed = sum(not check.ok for check in results)
    summary = f"{failed} of {format_plural(len(results), 'check')} failed" if failed else "all required checks passed"
    print(f"\n{style(summary, RED if failed else GREEN)}", file=stream, flush=True)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in results]}))
    return EXIT_FAILED if failed else EXIT_OK


def format_check(check: CheckResult, style: Style) -> str:
    """Format a check in lines of at most 80 columns; a failed one is followed by its fix."""
    mark = "ok" if check.ok else "FAIL"
    head = f"{mark:<4} {check.name:<11}  "
    first, *rest = wrap_text(head + strip_control_characters(check.detail), CHECK_TEXT_WIDTH, len(head))
    if check.fix:
        rest += wrap_text(f"{'':<5}{'fix:':<11}  {strip_control_characters(check.fix)}", CHECK_TEXT_WIDTH, len(head))
    return "\n".join([first.replace(mark, style(mark, GREEN if check.ok else RED), 1), *rest])


def iter_checks(folder: Path) -> Iterator[CheckResult]:
    """Yield all checks in the order in which to fix them; the job, which depends on the others, comes last."""
    requirements = read_requirements()
    torch_info = machine_checks.inspect_torch_in_subprocess(folder, "torch" + requirements[""]["torch"])
    yield check_version(
        "python", ".".join(map(str, sys.version_info[:3])), metadata(DISTRIBUTION_NAME)["Requires-Python"]
    )
    yield check_packages({name: bounds for name, bounds in requirements[""].items() if name != "torch"})
    if isinstance(torch_info, TorchInfo):
        yield check_version("torch", torch_info.version, requirements[""]["torch"])
        yield machine_checks.check_gpus(torch_info, count_gpus())
        yield machine_checks.check_backends(torch_info)
    else:
        yield torch_info
    for name, host in (("loopback", "127.0.0.1"), ("localhost", "localhost"), ("host name", socket.gethostname())):
        yield machine_checks.check_address(name, host)
    yield machine_checks.check_shared_memory(machine_checks.SHM_PATH)
    yield machine_checks.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield machine_checks.check_cores(
        count_cores(), machine_checks.read_cgroup_cpu_limit(machine_checks.CPU_MAX_PATH), os.environ
    )
    yield machine_checks.check_run_folder(folder / "runs" if (folder / "runs").is_dir() else folder)
    yield machine_checks.check_wandb(os.environ)
    yield machine_checks.check_slurm()
    yield from (check_optional_extra(name, needs) for name, needs in requirements.items() if name not in ("", "dev"))
    yield check_training_job(
        JOB_OVERRIDES
        if isinstance(torch_info, TorchInfo) and torch_info.gpus > 1
        else (*JOB_OVERRIDES, "train.device=cpu"),
        JOB_TIMEOUT_S,
    )


# --- installed packages -------------------------------------------------------------------------------------------


def read_requirements() -> Mapping[str, dict[str, str]]:
    """Return the version bounds of pyproject.toml by extra and package; the extra "" holds the required packages."""
    bounds: dict[str, dict[str, str]] = {}
    for line in requires(DISTRIBUTION_NAME) or ():
        requirement, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", requirement)[0]
        extra = marker.partition("extra ==")[2].strip(" '\"")
        bounds.setdefault(extra, {})[name] = requirement[len(name) :].strip()
    return bounds


def is_version_within(installed: str, bounds: str) -> bool:
    """Whether a version such as 2.13.0+cpu satisfies bounds such as `>=2.8,<3`."""
    compare = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    return all(
        compare[sign](parse_release(installed), parse_release(bound))
        for sign, bound in re.findall(r"(>=|<|==)\s*([\d.]+)", bounds)
    )


def parse_release(version: str) -> tuple[int, ...]:
    return tuple(map(int, [*re.findall(r"\d+", version.partition("+")[0]), 0, 0][:3]))


def get_installed_version(name: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check_version(name: str, installed: str, bounds: str) -> CheckResult:
    fix = (
        f"make env PYTHON=python3.12, or any version {bounds}" if name == "python" else f"pip install '{name}{bounds}'"
    )
    return (
        CheckResult(name, True, installed)
        if is_version_within(installed, bounds)
        else CheckResult(name, False, f"{installed} is not {bounds}", fix)
    )


def check_packages(required: Mapping[str, str]) -> CheckResult:
    wrong = [
        name for name, bounds in required.items() if not is_version_within(get_installed_version(name) or "0", bounds)
    ]
    detail = ", ".join(f"{name} {get_installed_version(name) or 'is not installed'}" for name in wrong)
    fix = " ".join(["pip install", *(f"'{name}{required[name]}'" for name in wrong)])
    return (
        CheckResult("packages", False, detail, fix)
        if wrong
        else CheckResult("packages", True, f"{len(required)} required packages installed")
    )


def check_optional_extra(name: str, needs: Mapping[str, str]) -> CheckResult:
    """Check an optional extra; it is listed under the name of its last package."""
    *_, title = needs
    installed, install = get_installed_version(title), f"pip install '{DISTRIBUTION_NAME}[{name}]'"
    if not all(map(get_installed_version, needs)):
        return CheckResult(title, True, f"not installed: {install}")
    return CheckResult(
        title,
        True,
        installed if is_version_within(installed, needs[title]) else f"{installed} is not {needs[title]}: {install}",
    )


# --- a real training job ------------------------------------------------------------------------------------------


def check_training_job(overrides: Sequence[str], timeout_s: float) -> CheckResult:
    """Train a few updates with two processes, started by the driver as usual; all files are removed afterwards."""
    started_s = time.monotonic()
    try:
        problem = run_smoke_job(overrides, timeout_s)
    except OSError as error:
        return CheckResult("smoke job", False, str(error), "export TMPDIR=/a/folder/that/can/be/written")
    if problem:
        return CheckResult("smoke job", False, problem, shlex.join(["launcher", *overrides, "debug=true"]))
    return CheckResult(
        "smoke job", True, f"2 workers trained {JOB_UPDATES} updates in {format_duration(time.monotonic() - started_s)}"
    )


def run_smoke_job(overrides: Sequence[str], timeout_s: float) -> str:
    """Run the job and describe what went wrong; empty on success."""
    from launcher.system.processes import kill_process_tree
    from launcher.system.signal_handlers import sigterm_as_keyboard_interrupt

    argv = [sys.executable, "-m", "launcher", *overrides, "run.name=smoke"]
    folder = tempfile.TemporaryDirectory(prefix="launcher-doctor-", ignore_cleanup_errors=True)
    with sigterm_as_keyboard_interrupt(), folder as job_dir, (Path(job_dir) / "output").open("wb") as output:
        env = os.environ | {"TMPDIR": job_dir}  # a killed driver leaves its temporary files there
        driver = subprocess.Popen(argv, cwd=job_dir, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"the job did not finish within {format_duration(timeout_s)} and was killed"
        finally:
            kill_process_tree(driver)
        return diagnose_job(Path(job_dir), driver.returncode)


def diagnose_job(job_dir: Path, status: int) -> str:
    """Describe what is wrong with a job that ended in `job_dir`; empty if both workers trained it to the end."""
    if status != EXIT_OK:
        lines = (job_dir / "output").read_text(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        errors = [LOG_HINT_PATTERN.sub("", error) for error in errors]
        first, last = (errors[0], errors[-1]) if errors else ("", describe_exit("the driver", status))
        # the first error is from a worker without a failure record
        return f"{last}: {first}" if first not in last else last
    run = RunDirectory(job_dir / "runs" / "smoke")
    try:
        world_sizes = {row.get("world") for row in read_run_metrics(str(run.path)).rows}
        done = run.read_done()
    except UsageError as error:
        return str(error)
    if world_sizes != {2} or done is None:
        return (
            f"the job trained with world sizes {world_sizes} instead of 2"
            if done
            else "the job ended without done.json"
        )
    return ""
