"""The command line as a user sees it: exit statuses, one-line errors, and no files left behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

import launcher.cli.main as command
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, UsageError
from launcher.topology import Topology
from tests.helpers import written_runs as written

pytestmark = pytest.mark.process

Result = subprocess.CompletedProcess[str]

TINY = """\
from dataclasses import dataclass


@dataclass(frozen=True)
class Tiny:
    width: int = 16

    def model(self): ...
    def dataset(self, split): ...
    def loss(self, model, batch): ...

    def size(self, split):
        return 1000 if split == "train" else 200
"""
TINY_YAML = """\
# @package _global_
recipe: {_target_: tiny.Tiny, trust: [tiny], width: 16}
lr: {base: 0.1, base_batch: 64}
"""


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """An empty current folder, next to a folder with the user's recipe and its YAML."""
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "tiny.yaml").write_text(TINY_YAML)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "tiny.py").write_text(TINY)
    cwd = tmp_path / "here"
    cwd.mkdir()
    return cwd


@pytest.fixture
def launcher(cwd: Path) -> Callable[..., Result]:
    """Run the real command in the empty folder, outside any job."""

    def start(*args: str, env: dict[str, str] | None = None, python: Sequence[str] = ("-m", "launcher")) -> Result:
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        clean["PYTHONPATH"] = str(cwd.parent / "code")
        return subprocess.run(
            [sys.executable, *python, *args],
            cwd=cwd,
            env={**clean, **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start


MINE = ("--config-dir", "../mine", "recipe=tiny")


def assert_refused(result: Result, cwd: Path, message: str) -> None:
    """Assert exit status 2, one line on stderr, nothing on stdout, and nothing created."""
    assert result.returncode == EXIT_USAGE, result.stderr
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(cwd.iterdir()) == []


# --- errors are one line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tran"], "tran is not a command: did you mean train?"),
        (["frobnicate"], "frobnicate is not a command: choose from train, plan"),
        (["worker"], "worker is started by the driver only"),
        (["--confg-dir", "x"], "--confg-dir is not a flag: did you mean --config-dir?"),
        (["--config-dir"], "--config-dir has no value"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
        (["--cfg", "jobs"], "--cfg jobs: choose from job, hydra, all"),
        (["batch.per_devic=8"], "batch.per_devic is not a key: did you mean batch.per_device?"),
        ([*MINE, "batch.per_device=many"], "batch.per_device=many: expected a whole number"),
        (["recipe=resnt"], "recipe=resnt: "),
        (["world=4"], "the world size comes from the job"),
        (["seed=1,2"], "seed=1,2 is a sweep: add -m"),
        ([*MINE, "-m", "seed=1,x"], "seed=x: expected a whole number"),
        ([*MINE, "-m", "run.name=a,b"], "run.name can't be swept over"),
        ([*MINE, "recipe.data=???"], "recipe.data"),
        (["recipe.data=[1"], "recipe.data=[1 cannot be read"),
        ([*MINE, "run.name=../x"], "run.name=../x: type up to 64 letters"),
        ([*MINE, "batch=scale", "batch.global=256"], "batch.global=256 does not work with batch=scale"),
        (["optimizer.lr=0.1"], "type lr.base=0.1"),
        (["plan", "train"], "train is not an override: type the command first"),
        (["plan", *MINE, "-m", "seed=1,2"], "-m starts several runs"),
        (["tune", *MINE, "-m", "seed=1,x"], "seed=x: expected a whole number"),
        (["-m", "tune", *MINE], "tune is not an override: type the command first"),
        (["new"], "new takes one name, not none: type launcher new my_recipe"),
        (["new", "a", "b"], "new takes one name, not a b: type launcher new my_recipe"),
        (["new", "--force"], "new takes one name, not --force"),
        (["new", "my-net"], "my-net is not a valid recipe name"),
        (["new", "tiny"], "tiny is an installed module"),
        (["new", "resnet"], "type launcher new my_resnet"),
        (["watch"], "watch takes one run, not none: type launcher watch RUN"),
        (["watch", "a", "b"], "watch takes one run, not a b"),
        (["watch", "--all"], "watch takes one run, not --all"),
        (["watch", "nowhere"], "nowhere is not a run: there are no runs in runs/"),
    ],
)
def test_usage_error_is_one_line_and_status_2(
    launcher: Callable[..., Result], cwd: Path, args: list[str], message: str
) -> None:
    assert_refused(launcher(*args), cwd, message)


def test_secrets_are_masked_in_error_messages(launcher: Callable[..., Result], cwd: Path) -> None:
    result = launcher("recipe.password=hunter2,hunter3")
    assert_refused(result, cwd, "recipe.password=***")
    assert "hunter" not in result.stderr


def test_debug_prints_traceback_before_error_line(launcher: Callable[..., Result], cwd: Path) -> None:
    result = launcher(*MINE, "debug=true", "seed=s3://u:hunter2@h")
    assert result.returncode == EXIT_USAGE
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: seed=s3://u:***@h")
    assert "hunter2" not in result.stderr


def test_only_rank_0_prints_under_torchrun(launcher: Callable[..., Result], cwd: Path) -> None:
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert_refused(
        launcher("-m", "seed=1,2", env={**job, "RANK": "0", "LOCAL_RANK": "0"}),
        cwd,
        "-m does not work in torchrun: type launcher -m seed=1,2 without torchrun",
    )
    assert_refused(
        launcher("tune", "-m", "seed=1,2", env={**job, "RANK": "0", "LOCAL_RANK": "0"}),
        cwd,
        "-m does not work in torchrun: type launcher tune -m seed=1,2 launch.workers=2 without torchrun",
    )
    silent = launcher("-m", "seed=1,2", env={**job, "RANK": "1", "LOCAL_RANK": "1"})
    assert (silent.returncode, silent.stdout, silent.stderr) == (EXIT_USAGE, "", "")


# --- help, version, configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--help"], "batch.per_device=32"),
        (["-h"], "batch.per_device=32"),
        (["recipe=mlp", "--help"], "batch.per_device=32"),
        (["train", "--help"], "batch.per_device=32"),
        (["plan", "-h"], "plan.world_sizes=null"),
        (["tune", "recipe=mlp", "-h"], "tune.budget_s=null"),
        (["new", "-h"], "Usage: launcher new NAME"),
        (["report", "--help"], "Usage: launcher report RUN... [-o FILE.html]"),
        (["watch", "-h"], "Usage: launcher watch RUN"),
    ],
)
def test_help_goes_to_stdout_within_80_columns(
    launcher: Callable[..., Result], cwd: Path, args: list[str], shown: str
) -> None:
    result = launcher(*args, env={"COLUMNS": "80"})
    assert (result.returncode, result.stderr) == (EXIT_OK, "")
    assert shown in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert list(cwd.iterdir()) == []


def test_command_alone_prints_help_and_trains_nothing(launcher: Callable[..., Result], cwd: Path) -> None:
    result = launcher()
    assert (result.returncode, result.stderr) == (EXIT_OK, "")
    assert result.stdout.startswith("Usage: launcher [COMMAND]")
    assert list(cwd.iterdir()) == []


def test_help_imports_neither_hydra_nor_torch(launcher: Callable[..., Result]) -> None:
    assert list_imported_modules(launcher, ["--help"]).isdisjoint(
        {"torch", "hydra", "omegaconf", "wandb", "rich", "numpy"}
    )


def test_version_flag_prints_version(launcher: Callable[..., Result]) -> None:
    result = launcher("--version")
    assert result.returncode == EXIT_OK
    assert result.stdout.startswith("launcher ")


def test_cfg_flag_prints_whole_config(launcher: Callable[..., Result], cwd: Path) -> None:
    result = launcher(*MINE, "--cfg", "job")
    assert (result.returncode, result.stderr) == (EXIT_OK, "")
    assert "batch:\n  policy: scale\n  per_device: 32\n" in result.stdout
    assert list(cwd.iterdir()) == []


def test_closed_stdout_pipe_is_not_an_error(cwd: Path) -> None:
    piped = f"{shlex.quote(sys.executable)} -m launcher --help | head -n 1"
    result = subprocess.run(["bash", "-c", piped], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (EXIT_OK, "")


# --- plan ---------------------------------------------------------------------------------------------------------


def test_plan_prints_json_to_stdout_notes_to_stderr(launcher: Callable[..., Result], cwd: Path) -> None:
    result = launcher("plan", *MINE, "batch.global=250", "plan.world_sizes=[1,3,300]", "format=json")
    assert result.returncode == EXIT_OK, result.stderr
    document = json.loads(result.stdout)
    assert document["policy"] == "hold"
    assert [(row["world"], row["feasible"]) for row in document["plans"]] == [(1, True), (3, True), (300, False)]
    assert document["plans"][1]["shares"] == [84, 83, 83]
    assert "note: batch.global=250 selects batch=hold" in result.stderr
    assert list(cwd.iterdir()) == []


def test_plan_table_fits_80_columns(launcher: Callable[..., Result], cwd: Path) -> None:
    result = launcher("plan", *MINE, "plan.world_sizes=[1,2,8]")
    assert result.returncode == EXIT_OK, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert list(cwd.iterdir()) == []


def test_plan_imports_no_torch(launcher: Callable[..., Result]) -> None:
    assert list_imported_modules(launcher, ["plan", *MINE]).isdisjoint({"torch", "wandb"})


def test_new_and_watch_import_neither_torch_nor_hydra(launcher: Callable[..., Result], cwd: Path) -> None:
    slow = {"torch", "wandb", "numpy", "hydra", "omegaconf"}
    assert list_imported_modules(launcher, ["new", "my_recipe"]).isdisjoint(slow)
    facts = {"samples": 64, "updates": 1, "seconds": 1.0}
    written.write_run(cwd / "runs" / "x", [written.make_row(1)], [{"time": 1001.0, "event": "done", **facts}])
    (cwd / "runs" / "x" / "run.yaml").touch()
    (cwd / "runs" / "x" / "done.json").write_text(json.dumps(facts))
    assert list_imported_modules(launcher, ["watch", "x"]).isdisjoint(slow)


def list_imported_modules(launcher: Callable[..., Result], args: list[str]) -> set[str]:
    """Return the modules that a command imports."""
    code = "import sys; from launcher.cli.main import main; main(sys.argv[1:]); print('modules', *sys.modules)"
    result = launcher(*args, python=("-c", code))
    assert "error:" not in result.stderr
    return set(result.stdout.splitlines()[-1].split())


# --- the table of commands -------------------------------------------------------------------------------------------


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run main() with a training function that returns a status or raises an exception."""

    def run(ending: object, *args: str) -> int:
        def train(_: Sequence[str]) -> int:
            if isinstance(ending, BaseException):
                raise ending
            assert isinstance(ending, int)
            return ending

        monkeypatch.setattr("launcher.cli.train.run_train", train)
        return command.main(list(args))

    return run


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (0, EXIT_OK),
        (1, EXIT_FAILED),
        (UsageError("batch.global=9 is below 16 workers"), EXIT_USAGE),
        (RuntimeError("boom"), EXIT_FAILED),
        (KeyboardInterrupt(), EXIT_INTERRUPTED),
    ],
)
def test_training_outcome_sets_exit_status(run_main: Callable[..., int], ending: object, status: int) -> None:
    assert run_main(ending, "seed=1") == status
    assert run_main(ending, "train", "seed=1") == status
    assert run_main(ending, "train") == status


def test_unexpected_error_prints_one_line(run_main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    run_main(RuntimeError("boom\nat s3://u:hunter2@h"), "seed=1")
    assert capsys.readouterr().err == "error: RuntimeError: boom at s3://u:***@h (debug=true shows where)\n"
    run_main(AssertionError(), "seed=1")
    assert capsys.readouterr().err == "error: AssertionError (debug=true shows where)\n"
    run_main(RuntimeError("boom"), "debug=true")
    assert capsys.readouterr().err.startswith("Traceback")


def test_worker_prints_traceback(
    run_main: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert Topology.from_env() is not None
    for args in ([], ["train", "seed=1"]):
        run_main(RuntimeError("boom"), *args)
        assert "Traceback" in capsys.readouterr().err


def test_other_command_beside_a_job_prints_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell inside an allocation has the variables of a worker."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("launcher.cli.verify.run_verify", Mock(side_effect=RuntimeError("boom")))
    assert command.main(["verify", "seed=1"]) == EXIT_FAILED
    assert capsys.readouterr().err == "error: RuntimeError: boom (debug=true shows where)\n"


@pytest.mark.parametrize("argument", ["train", "plan", "frob", "a/b"])
def test_first_argument_without_value_is_a_verb(argument: str) -> None:
    assert command.is_verb(argument)


@pytest.mark.parametrize("argument", ["seed=1", "-m", "--help", "+recipe.x=1", "~optimizer.momentum"])
def test_override_or_flag_is_not_a_verb(argument: str) -> None:
    assert not command.is_verb(argument)
