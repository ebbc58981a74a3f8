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
from launcher.config.slurm_syntax import format_time_limit, parse_node_range
from launcher.errors import UsageError
from launcher.slurm.job_script import SCRIPT_BODY, render_sbatch_script

RUN = RunConfig(
    recipe={"_target_": "launcher.recipes.mlp.MLP"}, launch=LaunchConfig(kind="slurm", time="1h", nodes="2")
)


def text(words: list[str] | None = None, **launch: Any) -> str:
    return render_sbatch_script(
        replace(RUN, launch=replace(RUN.launch, **launch)), words or ["recipe=mlp"], "/venv/bin/python"
    )


def options(rendered: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in rendered.splitlines() if line.startswith("#SBATCH ")]


def test_every_key_is_an_option() -> None:
    made = text(
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
    assert options(made) == [
        "--job-name=mlp",
        "--nodes=2-4",
        "--ntasks-per-node=1",
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


def test_a_fixed_number_of_nodes_waits_for_all_of_them_a_range_goes_on_without_some() -> None:
    assert "NODES=$SLURM_JOB_NUM_NODES\nsurvive=()\n" in text(nodes="2")
    assert "NODES=2:$SLURM_JOB_NUM_NODES\nsurvive=(--no-kill --kill-on-bad-exit=0)\n" in text(nodes="2-4")


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=4))
def test_words_reach_the_shell_as_they_are(words: list[str]) -> None:
    made = text(["recipe=mlp", *words])
    line = made.removesuffix(SCRIPT_BODY).partition("container=()\n")[2]
    assert shlex.split(line) == ["set", "--", "recipe=mlp", *words]


def test_bash_reads_it_and_hostile_words_start_nothing(tmp_path: Any) -> None:
    hostile = ["a'b", '"; touch hacked', "$(touch hacked)", "`touch hacked`", "two\nlines", "\\"]
    head = text(hostile, env={"MARK": hostile[1]}).removesuffix(SCRIPT_BODY)
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
    assert subprocess.run(["bash", "-n"], input=text(hostile), text=True, check=False).returncode == 0


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
def test_what_slurm_could_misread_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        text(**{key: value})
    assert str(caught.value).startswith(f"launch.{key}")
    assert "\n" not in str(caught.value)
    assert "type" in str(caught.value) or "copy" in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "told"),
    [("4h", "240"), ("30min", "30"), ("90s", "2"), ("1.5h", "90"), ("2d", "2880"), ("45", "45"), ("1-12:00:00",) * 2],
)
def test_times(typed: str, told: str) -> None:
    assert format_time_limit(typed) == told


def test_node_ranges() -> None:
    assert (parse_node_range("3"), parse_node_range("2-4")) == ((3, 3), (2, 4))
