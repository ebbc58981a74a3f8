"""DeepSpeed's stages against plain torch, in real process groups of 2, 3 and 1 ranks; then as a user runs it.

The comparisons are in zero_cases.py. One start runs all cases of a world size, since importing DeepSpeed and forming
a group takes longer than most cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_main_job import HELD, driven, here  # noqa: F401 (a fixture)

from tests.helpers.jobs import environment, events, furthest, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one world size leaves its states for the next."""
    return tmp_path_factory.mktemp("states")


def outcomes(folder: Path, world: int) -> dict[str, str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    argv = [*torchrun, str(HERE / "zero_cases.py"), str(folder)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str] = json.loads((folder / f"outcomes-{world}.json").read_text())
    return found


@pytest.mark.parametrize("world", [2, 3, 1])
def test_every_stage_is_plain_torch_in_another_layout(states: Path, world: int) -> None:
    """Run in this order: world size 3 takes over what 2 left, and 1 takes over what 3 left."""
    found = outcomes(states, world)
    assert len(found) > 100
    wrong = {name: text[-1500:] for name, text in found.items() if text}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


def test_a_job_changes_to_stage_3_and_back_and_loses_a_worker(here: Path) -> None:  # noqa: F811
    """DDP on 2, stage 3 on 3 with a worker killed in between, DDP on 1: equal to one DDP process."""
    job = [*HELD, "optimizer=adamw", "lr.base=0.01", "schedule=cosine"]
    driven(here, *job, "launch.workers=1", "run.name=whole")
    fault = {"LAUNCHER_TEST_FAULTS": "1"}
    driven(here, *job, "launch.workers=2", "run.name=parts", **fault, FAULT="stop@forward:0:6:1")
    zero = ["strategy=deepspeed", "strategy.stage=3", "checkpoint.sharded=true", "launch.workers=3", "run.name=parts"]
    said = driven(here, *job, *zero, **fault, FAULT="kill@backward:1:9:2,stop@forward:0:14:3")
    assert "DeepSpeed" not in said.stdout + said.stderr, "its own messages are off"
    driven(here, *job, "launch.workers=1", "run.name=parts")
    assert furthest(here / "runs/whole", here / "runs/parts") <= 1e-5
    assert list({row["update"]: row for row in rows(here / "runs/parts")}) == list(range(1, 26))
    changed = [event["changed"] for event in events(here / "runs/parts", "resume")]
    assert [change.get("strategy.name") for change in changed] == [["ddp", "deepspeed"], None, ["deepspeed", "ddp"]]
    alarms = [event["kind"] for event in events(here / "runs/parts", "alarm")]
    assert alarms == ["peer"], "those who lost it say so, and nothing else went wrong"
