"""The job script: every key as an #SBATCH option, everything else quoted for the shell."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import LaunchConfig, RunConfig
from launcher.errors import UsageError
from launcher.slurm.job_script import SCRIPT_BODY, render_sbatch_script

RUN = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.MLP"}, launch=LaunchConfig(kind="slurm", time="1h", nodes="2")
)


def render(args: list[str] | None = None, **launch: Any) -> str:
    return render_sbatch_script(
        replace(RUN, launch=replace(RUN.launch, **launch)), args or ["recipe=mlp"], "/venv/bin/python"
    )


def sbatch_options(rendered: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in rendered.splitlines() if line.startswith("#SBATCH ")]


def test_every_key_becomes_an_sbatch_option() -> None:
    made = render(
        *[[]],
        nodes="2-4",
        time="90min",
        partition="gpu,long",
        account="ab-12",
        qos="high",
        constraint="a100|h100",
        extra=("--gpus-per-node=4", "--exclusive"),
        workers=4,
        threads=2,
    )
    assert sbatch_options(made) == [
        "--job-name=mlp",
        "--nodes=2-4",
        "--cpus-per-task=8",
        "--time=90",
        "--partition=gpu,long",
        "--account=ab-12",
        "--qos=high",
        "--constraint=a100|h100",
        "--signal=B:USR1@60",
        "--requeue",
        "--open-mode=append",
        "--output=runs/.slurm/%j.out",
        "--no-kill",
        "--gpus-per-node=4",
        "--exclusive",
    ]
    assert made.endswith(SCRIPT_BODY)


def test_fixed_number_of_nodes_has_one_task_each() -> None:
    assert sbatch_options(render(nodes="2"))[1:3] == ["--nodes=2", "--ntasks-per-node=1"]
    assert "--ntasks-per-node=1" not in sbatch_options(render(nodes="2-4")), "Slurm would allocate two of three nodes"


def test_node_range_survives_lost_nodes() -> None:
    assert "NODES=$SLURM_JOB_NUM_NODES\nsurvive=()\n" in render(nodes="2")
    assert "NODES=2:$SLURM_JOB_NUM_NODES\nsurvive=(--no-kill --kill-on-bad-exit=0)\n" in render(nodes="2-4")


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=4))
def test_arguments_are_quoted_for_the_shell(args: list[str]) -> None:
    made = render(["recipe=mlp", *args])
    line = made.removesuffix(SCRIPT_BODY).partition("container=()\n")[2]
    assert shlex.split(line) == ["set", "--", "recipe=mlp", *args]


def test_hostile_arguments_run_nothing(tmp_path: Any) -> None:
    hostile = ["a'b", '"; touch hacked', "$(touch hacked)", "`touch hacked`", "two\nlines", "\\"]
    head = render(hostile, env={"MARK": hostile[1]}).removesuffix(SCRIPT_BODY)
    script = 'printf "%s\\0" "$MARK" "$@"'
    done = subprocess.run(
        ["bash", "-c", head + script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_NUM_NODES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\0")[:-1] == [hostile[1], *hostile]
    assert not list(tmp_path.iterdir())
    assert subprocess.run(["bash", "-n"], input=render(hostile), text=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "low\n#SBATCH --wrap=evil"),
        ("partition", "a b"),
        ("account", "a;b"),
        ("qos", "$(id)"),
        ("constraint", "a #b"),
        ("constraint", "'a'"),
        ("nodes", "4-2"),
        ("nodes", "0"),
        ("nodes", "2;3"),
        ("time", "4 hours"),
        ("time", "0"),
        ("time", "1h\n"),
        ("time", None),
        ("extra", ("--mem=1 --wrap=evil",)),
        ("extra", ("-n4",)),
        ("extra", ("--nodes=3",)),
        ("extra", ("--signal=KILL",)),
        ("extra", ('--comment="a"',)),
    ],
)
def test_unsafe_values_are_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        render(**{key: value})
    assert str(caught.value).startswith(f"launch.{key}")
    assert "\n" not in str(caught.value)
    assert "type" in str(caught.value) or "copy" in str(caught.value)
