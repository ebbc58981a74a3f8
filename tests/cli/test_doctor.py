"""`launcher doctor`: each check when it passes and, as realistically as is cheap, when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher.cli.main as command
from launcher.cli import doctor
from launcher.cli.machine_checks import CheckResult
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from launcher.system.formatting import Style
from tests.helpers.check_results import assert_failed, assert_passed
from tests.helpers.jobs import wait_for

# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with only these checks."""

    def run(*found: CheckResult, words: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(doctor, "iter_checks", lambda here: iter(found))
        return command.main(["doctor", *words])

    return run


def test_passing_checks_print_table_and_exit_0(
    run_doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_doctor(CheckResult("torch", True, "2.13.0"), CheckResult("optuna", True, "not installed: pip install x"))
        == EXIT_OK
    )
    captured = capsys.readouterr()
    assert captured.out == (
        "ok   torch        2.13.0\nok   optuna       not installed: pip install x\n\nall required checks passed\n"
    )
    assert captured.err == ""


def test_failed_check_prints_fix_and_exits_1(
    run_doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = CheckResult("open files", False, "up to 256", "ulimit -n 4096")
    assert run_doctor(CheckResult("torch", True, "2.13.0"), wrong) == EXIT_FAILED
    assert capsys.readouterr().out.splitlines()[1:] == [
        "FAIL open files   up to 256",
        "     fix:         ulimit -n 4096",
        "",
        "1 of 2 checks failed",
    ]


@pytest.mark.parametrize("ok", [True, False])
def test_json_goes_to_stdout_and_table_to_stderr(
    run_doctor: Callable[..., int], capsys: pytest.CaptureFixture[str], ok: bool
) -> None:
    check = CheckResult("torch", ok, "2.13.0", "" if ok else "pip install torch")
    assert run_doctor(check, words=("format=json",)) == (EXIT_OK if ok else EXIT_FAILED)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "ok": ok,
        "checks": [{"name": "torch", "ok": ok, "detail": "2.13.0", "fix": check.fix}],
    }
    assert captured.out.count("\n") == 1
    assert "torch        2.13.0" in captured.err


@pytest.mark.parametrize("word", ["foo", "batch.global=3", "--fast", "-m", "format=yaml"])
def test_unknown_argument_is_refused(
    run_doctor: Callable[..., int], capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert run_doctor(words=("format=json", word)) == EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: {word} is not an argument of doctor: type launcher doctor, or launcher doctor format=json\n"
    )
    assert captured.out == ""


def test_doctor_under_torchrun_is_refused(
    run_doctor: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert run_doctor() == EXIT_USAGE
    assert capsys.readouterr().err.endswith("type launcher doctor, without torchrun\n")


def test_help_runs_no_checks(run_doctor: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_doctor(CheckResult("torch", False, "absent"), words=("--help",)) == EXIT_OK
    assert "Usage: launcher doctor" in capsys.readouterr().out


def test_long_check_text_wraps_to_80_columns() -> None:
    detail, fix = "not installed: pip install 'elastic-batch-launcher[deepspeed]'", "word " * 40
    lines = doctor.format_check(CheckResult("tensorboard", False, detail, fix), Style(False)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"FAIL tensorboard  {detail}", "what one copies stands on one line"
    assert sum(line.count("word") for line in lines) == 40


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)]
)
def test_colour_follows_terminal_and_environment(env: dict[str, str], coloured: bool) -> None:
    line = doctor.format_check(CheckResult("torch", False, "absent", "pip"), Style.from_stream(Terminal(), env))  # type: ignore[arg-type]
    assert line.startswith("\x1b[31mFAIL\x1b[0m torch" if coloured else "FAIL torch")
    with open(os.devnull) as file:
        assert "\x1b" not in doctor.format_check(CheckResult("torch", False, "absent"), Style.from_stream(file, {}))


# --- installed packages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("have", "bounds", "holds"),
    [
        ("2.13.0+cpu", ">=2.8", True),
        ("2.7.1", ">=2.8", False),
        ("2.8", ">=2.8.0", True),
        ("1.3.8", "<1.4,>=1.3.2", True),
        ("1.4.0.dev1", "<1.4,>=1.3.2", False),
        ("0.19.8", "==0.19.8", True),
        ("0.19.10", "==0.19.8", False),
        ("3.10", ">=3.9", True),
    ],
)
def test_versions_are_compared_numerically(have: str, bounds: str, holds: bool) -> None:
    assert doctor.is_version_within(have, bounds) is holds


def test_requirements_match_pyproject() -> None:
    declared = doctor.read_requirements()
    assert declared[""]["torch"] == ">=2.8"
    assert set(declared[""]) >= {"hydra-core", "omegaconf", "wandb", "PyYAML", "scikit-learn"}
    assert declared["deepspeed"] == {"deepspeed": "==0.19.8"}
    assert list(declared["slurm"]) == ["hydra-submitit-launcher", "submitit"]


def test_version_out_of_bounds_fails() -> None:
    assert_passed(doctor.check_version("torch", "2.13.0+cpu", ">=2.8"), "2.13.0+cpu")
    assert_failed(doctor.check_version("torch", "2.7.0", ">=2.8"), "2.7.0 is not >=2.8", fix="pip install 'torch>=2.8'")
    assert_failed(doctor.check_version("python", "3.9.2", ">=3.10"), "3.9.2 is not >=3.10", fix="make env PYTHON=")


def test_missing_or_outdated_required_package_fails() -> None:
    assert_passed(doctor.check_packages({"pytest": ">=1", "numpy": ">=1"}), "2 required packages installed")
    found = doctor.check_packages({"no-such-package": ">=1", "pytest": ">=999", "numpy": ">=1"})
    assert_failed(found, "no-such-package is not installed", f"pytest {pytest.__version__}", fix="pip install")
    assert found.fix == "pip install 'no-such-package>=1' 'pytest>=999'"


def test_missing_optional_package_passes_with_note() -> None:
    assert_passed(
        doctor.check_optional_extra("slurm", {"numpy": ">=1", "no-such-package": ">=1"}),
        "not installed: pip install 'elastic-batch-launcher[slurm]'",
    )
    assert_passed(doctor.check_optional_extra("slurm", {"no-such-package": ">=1", "pytest": ">=1"}), "not installed")
    assert doctor.check_optional_extra("dev", {"pytest": ">=1"}) == CheckResult("pytest", True, pytest.__version__)
    assert_passed(
        doctor.check_optional_extra("dev", {"pytest": ">=999"}), f"{pytest.__version__} is not >=999: pip install"
    )


# --- the job ------------------------------------------------------------------------------------------------------


@pytest.fixture
def temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder where temporary folders are created."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_failed_job_reports_its_error_line(temp_dir: Path) -> None:
    found = doctor.check_training_job(("recipe=mlp", "batch.per_devic=3"), 60)
    assert_failed(
        found, "batch.per_devic is not a key: did you mean", fix="launcher recipe=mlp batch.per_devic=3 debug=true"
    )
    assert list(temp_dir.iterdir()) == []


def test_job_without_training_fails(temp_dir: Path) -> None:
    assert_failed(doctor.check_training_job(("--version",), 60), "is not a run", fix="launcher --version")


def test_job_that_exceeds_timeout_is_killed(temp_dir: Path) -> None:
    """Only the driver is checked here; that its workers die with it is covered by other tests."""
    assert_failed(
        doctor.check_training_job(doctor.JOB_OVERRIDES, 0.2),
        "did not finish within 0.2 s and was killed",
        fix="'sink=[]'",
    )
    assert list(temp_dir.iterdir()) == []
    here = str(temp_dir / "launcher-doctor-")
    wait_for(lambda: not [pid for pid in filter(str.isdigit, os.listdir("/proc")) if read_cwd(pid).startswith(here)])


def read_cwd(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def test_unusable_temp_folder_suggests_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    assert_failed(doctor.check_training_job(doctor.JOB_OVERRIDES, 60), "/proc", fix="export TMPDIR=")


def write_run(folder: Path, worlds: list[int], done: bool) -> Path:
    run = folder / "runs" / "smoke"
    run.mkdir(parents=True)
    rows = [{"samples": 64 * i, "update": i, "world": world} for i, world in enumerate(worlds, start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (run / "done.json").write_text('{"samples": 128}')
    return folder


def test_only_finished_job_of_two_ranks_passes(tmp_path: Path) -> None:
    assert doctor.diagnose_job(write_run(tmp_path / "a", [2, 2], done=True), EXIT_OK) == ""
    assert "{1}" in doctor.diagnose_job(write_run(tmp_path / "b", [1, 1], done=True), EXIT_OK)
    assert "without done.json" in doctor.diagnose_job(write_run(tmp_path / "c", [2, 2], done=False), EXIT_OK)


@pytest.mark.parametrize(
    ("output", "status", "why"),
    [
        ("note: x\nerror: rank 1 failed in a.py:7: ValueError: (no) (log: /tmp/x/rank1.log)\n", 1, "ValueError: (no)"),
        ("error: ImportError: x (debug=true shows where)\nerror: killed (logs: /x)\n", 1, "killed: ImportError: x"),
        ("Segmentation fault\n", -signal.SIGKILL, "the driver was killed by SIGKILL: out of memory?"),
    ],
)
def test_last_error_line_is_reported_without_log_paths(tmp_path: Path, output: str, status: int, why: str) -> None:
    (tmp_path / "output").write_text(output)
    assert doctor.diagnose_job(tmp_path, status).endswith(why)


def test_doctor_imports_no_torch() -> None:
    code = "import sys; import launcher.cli.doctor; print(*sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "wandb", "numpy"} & set(completed.stdout.split())
