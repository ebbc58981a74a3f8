"""Ranks that hang or lag behind in a real job: found, named, and training ends with the same result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_main_job import HELD, RECIPE, TORCHRUN, driven, run

from tests.helpers.jobs import events, furthest, rows

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]

TWO = [*HELD, "launch.workers=2", "+recipe.drop=0.3"]
FOUND_S = 6.0
RECOVERED_S = 12.0


BLOCKING = """
import os, threading
from dataclasses import dataclass
from pathlib import Path
import own

def blocks_once(rank, marker):
    if os.environ["RANK"] == rank and not Path(marker).exists():
        Path(marker).touch()
        threading.Event().wait()

class Items(own.Noisy):
    def __getitem__(self, i):
        if i == 100:
            blocks_once("0", "blocked")
        return super().__getitem__(i)

@dataclass(frozen=True)
class Blocking(own.Own):
    def dataset(self, split):
        return Items(203 if split == "train" else 5)
"""


def hangs(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in events(run_dir, "alarm") if event["kind"] == "hang"]


def recoveries_s(run_dir: Path) -> list[float]:
    """Return the time from the end of the last update before a restart to the end of the first one after it."""
    return [row["elastic/recovery_s"] for row in rows(run_dir) if "elastic/recovery_s" in row]


def promptly(run_dir: Path, began: float) -> bool:
    """Found within 6 s; recovered within 12 s, or on a busy machine within the time of a start."""
    start_s = rows(run_dir)[0]["time"] - began
    found = all(alarm["seconds"] <= FOUND_S for alarm in hangs(run_dir))
    return found and max(recoveries_s(run_dir)) <= max(RECOVERED_S, FOUND_S + start_s)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed reference run."""

    folder = tmp_path_factory.mktemp("whole")
    (folder / "own.py").write_text(RECIPE)
    driven(folder, *TWO, "run.name=whole")
    return folder / "runs/whole"


def test_stopped_ranks_are_replaced_within_12_s_and_the_end_is_the_same(here: Path, whole: Path) -> None:
    """Rank 1 hangs while it computes, and after the restart rank 0 while it reads data."""
    began = time.time()
    fault = {"LAUNCHER_TEST_FAULTS": "1", "FAULT": "hang@forward:1:6,hang@data:0:14:2"}
    done = driven(here, *TWO, "run.name=h", **fault)
    found = [(alarm["rank"], alarm["phase"], alarm["update"]) for alarm in hangs(here / "runs/h")]
    assert found == [(1, "forward", 6), (0, "data", 14)]
    assert done.stderr.count("rank 1 failed in forward of update 6: Hang: its process is stopped") == 1
    assert "warning" not in done.stderr, "each is said once"
    assert promptly(here / "runs/h", began)
    assert furthest(here / "runs/h", whole) == 0.0
    assert [event["generation"] for event in events(here / "runs/h", "start")] == [1, 2, 3]
    assert not events(here / "runs/h", "error"), "the survivor's lost connection is no error of its own"


def test_a_data_set_that_blocks_leaves_its_stack_in_the_log(here: Path, whole: Path) -> None:
    """Sample 100 blocks rank 0 in Python once; heartbeats continue, and rank 1 waits in a collective."""
    (here / "blocking.py").write_text(BLOCKING)
    recipe = ["recipe._target_=blocking.Blocking", "recipe.trust=[blocking]", "elastic.hang_timeout_s=4"]
    driven(here, *TWO, *recipe, "elastic.first_timeout_s=20", "run.name=b")
    (alarm,) = hangs(here / "runs/b")
    assert (alarm["rank"], alarm["phase"]) == (0, "data")
    assert "no progress while the others wait" in alarm["detail"]
    log = (here / "runs/b/logs/rank0-g1.log").read_text()
    assert "in blocks_once" in log
    assert "in __getitem__" in log
    assert furthest(here / "runs/b", whole) == 0.0


def test_under_the_users_own_torchrun_it_is_the_same(here: Path, whole: Path) -> None:
    began = time.time()
    argv = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1", "-m", "launcher"]
    job = [one for one in TWO if not one.startswith("launch.workers")]
    done = run([*argv, *job, "run.name=t"], here, LAUNCHER_TEST_FAULTS="1", FAULT="hang@backward:1:6")
    assert [(one["rank"], one["phase"]) for one in hangs(here / "runs/t")] == [(1, "backward")]
    assert done.stderr.count("warning: rank 1 hung in backward of update 6") == 1
    assert promptly(here / "runs/t", began)
    assert furthest(here / "runs/t", whole) == 0.0


def test_the_survivors_of_a_killed_rank_leave_at_once(here: Path) -> None:
    """The end comes before the timeouts of the collective (ten minutes) and of the agent (half a minute)."""
    began = time.time()
    driven(here, *TWO, "launch.workers=3", "run.name=k", LAUNCHER_TEST_FAULTS="1", FAULT="kill@forward:1:12")
    assert max(recoveries_s(here / "runs/k")) <= 2 + rows(here / "runs/k")[0]["time"] - began


def test_slow_ranks_are_named_with_their_stage(here: Path) -> None:
    fault = {"LAUNCHER_TEST_FAULTS": "1", "FAULT": "slow@data:1:0,slow@forward:2:0"}
    driven(here, *HELD, "launch.workers=3", "train.duration=11ep", "run.name=s", **fault)
    alarms = [event for event in events(here / "runs/s", "alarm") if event["kind"] == "straggler"]
    assert sorted((alarm["rank"], alarm["stage"]) for alarm in alarms) == [(1, "data"), (2, "forward")]
    assert all(alarm["ratio"] > 1.5 for alarm in alarms)
