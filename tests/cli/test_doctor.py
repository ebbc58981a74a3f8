"""`launcher doctor`: each check when it passes and, as realistically as is cheap, when it fails."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher.cli.main as command
from launcher.cli import doctor, machine_checks
from launcher.cli.machine_checks import CheckResult, TorchInfo
from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from launcher.system.formatting import Style

TWO = TorchInfo("2.13.0+cu128", "12.8", 2, ["gloo", "nccl"])
NONE = TorchInfo("2.13.0+cpu", None, 0, ["gloo"])


def failed(check: CheckResult, *said: str, mend: str) -> None:
    assert not check.ok
    assert [word for word in said if word not in check.detail] == []
    assert mend in check.fix


def fine(check: CheckResult, *said: str) -> None:
    assert check.ok
    assert [word for word in said if word not in check.detail] == []
    assert check.fix == ""


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the verb with only these checks."""

    def run(*found: CheckResult, words: tuple[str, ...] = ()) -> int:
        monkeypatch.setattr(doctor, "iter_checks", lambda here: iter(found))
        return command.main(["doctor", *words])

    return run


def test_all_fine_is_a_table_and_status_0(finds: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        finds(CheckResult("torch", True, "2.13.0"), CheckResult("optuna", True, "not installed: pip install x"))
        == EXIT_OK
    )
    told = capsys.readouterr()
    assert told.out == (
        "ok   torch        2.13.0\nok   optuna       not installed: pip install x\n\nall required checks passed\n"
    )
    assert told.err == ""


def test_a_failure_is_status_1_with_its_mend_below_it(
    finds: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = CheckResult("open files", False, "up to 256", "ulimit -n 4096")
    assert finds(CheckResult("torch", True, "2.13.0"), wrong) == EXIT_FAILED
    assert capsys.readouterr().out.splitlines()[1:] == [
        "FAIL open files   up to 256",
        "     fix:         ulimit -n 4096",
        "",
        "1 of 2 checks failed",
    ]


@pytest.mark.parametrize("ok", [True, False])
def test_json_is_one_document_and_the_table_goes_to_stderr(
    finds: Callable[..., int], capsys: pytest.CaptureFixture[str], ok: bool
) -> None:
    check = CheckResult("torch", ok, "2.13.0", "" if ok else "pip install torch")
    assert finds(check, words=("format=json",)) == (EXIT_OK if ok else EXIT_FAILED)
    told = capsys.readouterr()
    assert json.loads(told.out) == {
        "ok": ok,
        "checks": [{"name": "torch", "ok": ok, "detail": "2.13.0", "fix": check.fix}],
    }
    assert told.out.count("\n") == 1
    assert "torch        2.13.0" in told.err


@pytest.mark.parametrize("word", ["foo", "batch.global=3", "--fast", "-m", "format=yaml"])
def test_a_word_that_means_nothing_is_refused_by_name(
    finds: Callable[..., int], capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert finds(words=("format=json", word)) == EXIT_USAGE
    told = capsys.readouterr()
    assert told.err == (
        f"error: {word} is not an argument of doctor: type launcher doctor, or launcher doctor format=json\n"
    )
    assert told.out == ""


def test_under_torchrun_it_says_what_to_type(
    finds: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert finds() == EXIT_USAGE
    assert capsys.readouterr().err.endswith("type launcher doctor, without torchrun\n")


def test_help_is_shown_and_nothing_is_looked_at(finds: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert finds(CheckResult("torch", False, "absent"), words=("--help",)) == EXIT_OK
    assert "doctor          check this machine" in capsys.readouterr().out


def test_the_longest_text_fits_80_columns_and_stays_whole() -> None:
    detail, mend = "not installed: pip install 'elastic-batch-launcher[deepspeed]'", "word " * 40
    lines = doctor.format_check(CheckResult("tensorboard", False, detail, mend), Style(False)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == f"FAIL tensorboard  {detail}", "what one copies stands on one line"
    assert sum(line.count("word") for line in lines) == 40


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)]
)
def test_colour_is_for_terminals_that_want_it(env: dict[str, str], coloured: bool) -> None:
    told = doctor.format_check(CheckResult("torch", False, "absent", "pip"), Style.from_stream(Terminal(), env))  # type: ignore[arg-type]
    assert told.startswith("\x1b[31mFAIL\x1b[0m torch" if coloured else "FAIL torch")
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
def test_versions_are_compared_as_numbers(have: str, bounds: str, holds: bool) -> None:
    assert doctor.version_satisfies(have, bounds) is holds


def test_what_is_wanted_is_what_pyproject_says() -> None:
    asked = doctor.declared_requirements()
    assert asked[""]["torch"] == ">=2.8"
    assert set(asked[""]) >= {"hydra-core", "omegaconf", "wandb", "PyYAML", "scikit-learn"}
    assert asked["deepspeed"] == {"deepspeed": "==0.19.8"}
    assert list(asked["slurm"]) == ["hydra-submitit-launcher", "submitit"]


def test_a_version_out_of_bounds_fails() -> None:
    fine(doctor.check_version("torch", "2.13.0+cpu", ">=2.8"), "2.13.0+cpu")
    failed(doctor.check_version("torch", "2.7.0", ">=2.8"), "2.7.0 is not >=2.8", mend="pip install 'torch>=2.8'")
    failed(doctor.check_version("python", "3.9.2", ">=3.10"), "3.9.2 is not >=3.10", mend="make env PYTHON=")


def test_a_required_package_that_is_absent_or_too_old_is_named() -> None:
    fine(doctor.check_packages({"pytest": ">=1", "numpy": ">=1"}), "2 required packages installed")
    found = doctor.check_packages({"no-such-package": ">=1", "pytest": ">=999", "numpy": ">=1"})
    failed(found, "no-such-package is not installed", f"pytest {pytest.__version__}", mend="pip install")
    assert found.fix == "pip install 'no-such-package>=1' 'pytest>=999'"


def test_an_optional_thing_that_is_absent_is_told_and_no_failure() -> None:
    fine(
        doctor.check_optional_extra("slurm", {"numpy": ">=1", "no-such-package": ">=1"}),
        "not installed: pip install 'elastic-batch-launcher[slurm]'",
    )
    fine(doctor.check_optional_extra("slurm", {"no-such-package": ">=1", "pytest": ">=1"}), "not installed")
    assert doctor.check_optional_extra("dev", {"pytest": ">=1"}) == CheckResult("pytest", True, pytest.__version__)
    fine(doctor.check_optional_extra("dev", {"pytest": ">=999"}), f"{pytest.__version__} is not >=999: pip install")


# --- the machine --------------------------------------------------------------------------------------------------


def test_an_address_of_this_machine_is_fine_whatever_it_is_called() -> None:
    assert machine_checks.check_address("loopback", "127.0.0.1") == CheckResult("loopback", True, "127.0.0.1")
    fine(machine_checks.check_address("localhost", "localhost"), "localhost resolves to ")


def test_a_name_that_leads_nowhere_or_elsewhere_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = machine_checks.check_address(
        "host name", "192.0.2.1"
    )  # reserved for documentation: no machine has this address
    failed(elsewhere, "is not an address of this machine", mend="echo '127.0.0.1 192.0.2.1' >> /etc/hosts")

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    failed(machine_checks.check_address("host name", "n" * 64), "does not resolve", mend="127.0.0.1 nnn")
    nowhere = machine_checks.check_address("host name", "node7")
    failed(nowhere, "node7 does not resolve (Name or service not known)", mend="'127.0.0.1 node7'")
    failed(machine_checks.check_address("loopback", "127.0.0.1"), mend="ip link set lo up")


def test_a_name_with_one_address_that_fits_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*_: object, **__: object) -> list[tuple[object, ...]]:
        stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*stream, ("192.0.2.1", 0)), (*stream, ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    fine(machine_checks.check_address("host name", "node7"), "node7 resolves to 127.0.0.1")


def test_shared_memory_of_a_containers_default_is_little_for_loader_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a failure: data.num_workers is 0 by default."""
    enough = machine_checks.check_shared_memory(tmp_path)
    fine(enough, str(tmp_path))
    assert "data.num_workers" not in enough.detail
    fine(machine_checks.check_shared_memory(tmp_path / "none"), "0 B free", "--shm-size")
    monkeypatch.setattr(machine_checks, "MIN_SHM_BYTES", 1e18)
    fine(
        machine_checks.check_shared_memory(tmp_path),
        str(tmp_path),
        "too little for data.num_workers=1 or more: docker run --shm-size=2g",
    )


@pytest.mark.parametrize(
    ("soft", "hard", "mend"), [(256, 65536, "ulimit -n 4096"), (256, -1, "ulimit -n 4096"), (256, 2048, "-n 2048")]
)
def test_few_open_files_are_raised_as_far_as_they_may(soft: int, hard: int, mend: str) -> None:
    failed(machine_checks.check_open_files(soft, hard), "up to 256", mend=mend)


def test_few_open_files_that_may_not_be_raised() -> None:
    failed(machine_checks.check_open_files(256, 256), mend="limits.conf")
    fine(machine_checks.check_open_files(1024, 1024), "1,024")
    fine(machine_checks.check_open_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), "no limit")


@pytest.mark.parametrize(
    ("text", "given"), [("200000 100000\n", 2.0), ("50000 100000", 0.5), ("max 100000\n", None), ("", None)]
)
def test_what_the_control_group_gives(tmp_path: Path, text: str, given: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert machine_checks.cgroup_cpu_limit(tmp_path / "cpu.max") == given
    assert machine_checks.cgroup_cpu_limit(tmp_path / "none") is None


def test_more_threads_than_cores_fail() -> None:
    assert machine_checks.check_cores(1, None, {}) == CheckResult("cores", True, "1 core")
    fine(machine_checks.check_cores(4, None, {"OMP_NUM_THREADS": "4"}), "4 cores, OMP_NUM_THREADS=4")
    failed(
        machine_checks.check_cores(4, None, {"OMP_NUM_THREADS": "8,2"}),
        "OMP_NUM_THREADS=8",
        mend="export OMP_NUM_THREADS=4",
    )
    failed(
        machine_checks.check_cores(64, 2.0, {"OMP_NUM_THREADS": "8"}),
        "limited by the container to 2",
        mend="export OMP_NUM_THREADS=2",
    )
    fine(machine_checks.check_cores(64, 2.5, {}), "64 cores, limited by the container to 2.5", "launch.threads=2")
    fine(machine_checks.check_cores(2, 0.5, {"OMP_NUM_THREADS": "1"}), "limited by the container to 0.5")


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    fine(machine_checks.check_run_folder(tmp_path), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_or_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(machine_checks.check_run_folder(Path("/proc")), "/proc cannot be written", mend="cd to ")
    monkeypatch.setattr(machine_checks, "MIN_DISK_BYTES", 1e18)
    failed(machine_checks.check_run_folder(tmp_path), "free in", mend="run.dir=")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    failed(machine_checks.check_run_folder(tmp_path), "Permission denied", mend="cd to ")


SECRET = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": SECRET}, "WANDB_MODE=disabled"),
        ({"WANDB_API_KEY": SECRET}, "online, with a key"),
        ({"NETRC": "netrc"}, "online, with a key"),
        ({"NETRC": "netrc", "WANDB_BASE_URL": "https://wandb.example.org"}, "offline, no key: wandb login"),
        ({"NETRC": "broken"}, "offline, no key: wandb login"),
        ({"NETRC": "none"}, "offline, no key: wandb login"),
    ],
)
def test_wandb_says_what_it_would_do_and_never_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    Path("broken").write_text("machine\n\0 what")
    assert machine_checks.check_wandb(env) == CheckResult("wandb", True, told)


def test_slurm_is_told_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fine(machine_checks.check_slurm(), "sbatch is not installed")
    (tmp_path / "sbatch").touch(mode=0o700)
    assert machine_checks.check_slurm() == CheckResult("slurm", True, "sbatch")


# --- torch and GPUs -----------------------------------------------------------------------------------------------


def test_torch_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    seen = machine_checks.inspect_torch_in_subprocess(tmp_path, "torch>=2.8")
    assert isinstance(seen, TorchInfo)
    assert doctor.version_satisfies(seen.version, ">=2.8")
    assert "gloo" in seen.backends


@pytest.mark.parametrize("name", ["torch.py", "torch/__init__.py"])
def test_a_file_that_hides_torch_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    failed(
        machine_checks.inspect_torch_in_subprocess(tmp_path, "torch>=2.8"),
        "ImportError: libcudart.so.12",
        mend=f"rename {name}",
    )  # type: ignore[arg-type]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [name]


def test_a_torch_that_kills_its_process_is_no_end_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned = "import os, sys; sys.stderr.write('a warning\\n'); sys.stderr.flush(); "
    (tmp_path / "torch.py").write_text(f"{warned}os.kill(os.getpid(), {signal.SIGILL.value})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "here").mkdir()
    found = machine_checks.inspect_torch_in_subprocess(tmp_path / "here", "torch>=2.8")
    failed(found, "importing it was killed by SIGILL", mend="--force-reinstall 'torch>=2.8'")  # type: ignore[arg-type]


def test_gpus_that_torch_does_not_compute_on_fail() -> None:
    fine(machine_checks.check_gpus(NONE, 0), "none: training runs on the CPU")
    fine(machine_checks.check_gpus(TWO, 2), "2 GPUs")
    fine(machine_checks.check_gpus(TWO, 0), "2 GPUs")  # the driver lists no GPU where we look
    failed(machine_checks.check_gpus(NONE, 1), "1 GPU found", "CPU-only build", mend="CUDA_VISIBLE_DEVICES= ")
    old = TorchInfo("2.13.0", "12.8", 0, ["gloo", "nccl"], "The NVIDIA driver on your system is too old")
    failed(machine_checks.check_gpus(old, 2), "computes on 0", "built for 12.8", "too old", mend="nvidia-smi")
    failed(machine_checks.check_gpus(TWO, 8), "8 GPUs found, torch computes on 2", mend="launch.workers=2")


def test_gloo_is_always_needed_and_nccl_with_gpus() -> None:
    fine(machine_checks.check_backends(NONE), "gloo")
    fine(machine_checks.check_backends(TWO), "gloo, nccl")
    failed(machine_checks.check_backends(TorchInfo("2.13.0", None, 0, ["nccl"])), "nccl", mend="gloo")
    failed(machine_checks.check_backends(TorchInfo("2.13.0", "12.8", 2, ["gloo"])), "gloo", mend="gloo and nccl")
    failed(machine_checks.check_backends(TorchInfo("2.13.0", None, 0, [])), "none", mend="gloo")


# --- the job ------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where temporary folders are created."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_job_that_fails_gives_its_error_line(alone: Path) -> None:
    found = doctor.check_training_job(("recipe=mlp", "batch.per_devic=3"), 60)
    failed(found, "batch.per_devic is not a key: did you mean", mend="launcher recipe=mlp batch.per_devic=3 debug=true")
    assert list(alone.iterdir()) == []


def test_a_job_that_trains_nothing_is_no_success(alone: Path) -> None:
    failed(doctor.check_training_job(("--version",), 60), "is not a run", mend="launcher --version")


def test_a_job_that_takes_too_long_is_ended(alone: Path) -> None:
    """Only the driver is checked here; that its workers die with it is covered by other tests."""
    failed(
        doctor.check_training_job(doctor.JOB_OVERRIDES, 0.2),
        "did not finish within 0.2 s and was killed",
        mend="'sink=[]'",
    )
    assert list(alone.iterdir()) == []
    here = str(alone / "launcher-doctor-")
    inside = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if folder_of(pid).startswith(here)]
    assert inside == []


def folder_of(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def test_a_temporary_folder_that_cannot_be_made_is_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    failed(doctor.check_training_job(doctor.JOB_OVERRIDES, 60), "/proc", mend="export TMPDIR=")


def trained(place: Path, worlds: list[int], done: bool) -> Path:
    run = place / "runs" / "smoke"
    run.mkdir(parents=True)
    rows = [{"samples": 64 * i, "update": i, "world": world} for i, world in enumerate(worlds, start=1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (run / "done.json").write_text('{"samples": 128}')
    return place


def test_only_a_job_of_two_that_ended_is_a_success(tmp_path: Path) -> None:
    assert doctor.diagnose_job(trained(tmp_path / "a", [2, 2], done=True), EXIT_OK) == ""
    assert "{1}" in doctor.diagnose_job(trained(tmp_path / "b", [1, 1], done=True), EXIT_OK)
    assert "without done.json" in doctor.diagnose_job(trained(tmp_path / "c", [2, 2], done=False), EXIT_OK)


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        ("note: x\nerror: rank 1 failed in a.py:7: ValueError: (no) (log: /tmp/x/rank1.log)\n", 1, "ValueError: (no)"),
        ("error: ImportError: x (debug=true shows where)\nerror: killed (logs: /x)\n", 1, "killed: ImportError: x"),
        ("Segmentation fault\n", -signal.SIGKILL, "the driver was killed by SIGKILL: out of memory?"),
    ],
)
def test_the_last_error_line_is_why_without_logs_that_are_gone(
    tmp_path: Path, said: str, status: int, why: str
) -> None:
    (tmp_path / "said").write_text(said)
    assert doctor.diagnose_job(tmp_path, status).endswith(why)


def test_doctor_needs_no_torch_of_its_own() -> None:
    code = "import sys; import launcher.cli.doctor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "wandb", "numpy"} & set(done.stdout.split())
