"""DeepSpeed's stages against plain torch, in real process groups of 2, 3 and 1 ranks; then as a user runs it.

The comparisons are in zero_cases.py. One start runs all cases of a world size, since importing DeepSpeed and forming
a group takes longer than most cases.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.jobs import make_env, max_parameter_difference, read_events, read_rows
from tests.helpers.small_job import HELD, TORCHRUN, run_launcher

pytestmark = pytest.mark.slow

ZERO_CASES = Path(__file__).parents[1] / "helpers/zero_cases.py"


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one world size leaves its states for the next."""
    return tmp_path_factory.mktemp("states")


def run_cases(folder: Path, world_size: int) -> dict[str, str]:
    """Return the traceback of each case, empty if it passed."""
    command = [*TORCHRUN, f"--nproc-per-node={world_size}", str(ZERO_CASES), str(folder)]
    completed = subprocess.run(command, env=make_env(), capture_output=True, text=True, timeout=1700, check=False)
    assert completed.returncode == 0, completed.stderr[-4000:]
    outcomes: dict[str, str] = json.loads((folder / f"outcomes-{world_size}.json").read_text())
    return outcomes


@pytest.mark.parametrize("world_size", [2, 3, 1])
def test_every_stage_equals_plain_torch(states: Path, world_size: int) -> None:
    """Run in this order: world size 3 takes over what 2 left, and 1 takes over what 3 left."""
    found = run_cases(states, world_size)
    assert len(found) > 100
    wrong = {name: text[-1500:] for name, text in found.items() if text}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


@pytest.mark.core
def test_job_changes_to_stage_3_and_back(workdir: Path) -> None:
    """DDP on 2, stage 3 on 3 with a worker killed in between, DDP on 1: equal to one DDP process."""
    job = [*HELD, "optimizer=adamw", "lr.base=0.01", "schedule=cosine"]
    run_launcher(workdir, *job, "launch.workers=1", "run.name=whole")
    fault = {"LAUNCHER_TEST_FAULTS": "1"}
    run_launcher(workdir, *job, "launch.workers=2", "run.name=parts", **fault, FAULT="stop@forward:0:6:1")
    zero = ["strategy=deepspeed", "strategy.stage=3", "checkpoint.sharded=true", "launch.workers=3", "run.name=parts"]
    completed = run_launcher(workdir, *job, *zero, **fault, FAULT="kill@backward:1:9:2,stop@forward:0:14:3")
    assert "DeepSpeed" not in completed.stdout + completed.stderr, "its own messages are off"
    run_launcher(workdir, *job, "launch.workers=1", "run.name=parts")
    assert max_parameter_difference(workdir / "runs/whole", workdir / "runs/parts") <= 1e-5
    assert list({row["update"]: row for row in read_rows(workdir / "runs/parts")}) == list(range(1, 26))
    changed = [event["changed"] for event in read_events(workdir / "runs/parts", "resume")]
    assert [change.get("strategy.name") for change in changed] == [["ddp", "deepspeed"], None, ["deepspeed", "ddp"]]
    alarms = [event["kind"] for event in read_events(workdir / "runs/parts", "alarm")]
    assert alarms == ["peer"], "the ranks that lost it report so, and nothing else went wrong"
