"""What a rank has done by the end of its first update: nothing that only later updates need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.small_job import HELD, LAUNCHER, RECIPE, TORCHRUN, run_command

pytestmark = pytest.mark.slow

#: The small recipe, which notes for each rank what is imported and which data has been opened at its first update.
NOTING = """
import gc, json, os, pathlib, sys
OPENED = []

def note(*_):
    first = pathlib.Path(f"first-{os.environ['RANK']}.json")
    if not first.exists():
        facts = {"modules": sorted(sys.modules), "opened": OPENED}
        facts |= {"collects": gc.isenabled(), "frozen": gc.get_freeze_count()}
        first.write_text(json.dumps(facts))

sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(note)
"""
OPEN = "        return Noisy("
LATER = {"deepspeed", "wandb", "launcher.tune.session", "launcher.sweep", "torch.distributed.checkpoint", "pydantic"}
COMPOSING = {"hydra", "omegaconf", "antlr4"}


@pytest.mark.parametrize("way", [pytest.param("torchrun", marks=pytest.mark.core), "driver"])
def test_first_update_waits_for_nothing_that_it_does_not_need(tmp_path: Path, way: str) -> None:
    (tmp_path / "own.py").write_text(RECIPE.replace(OPEN, f"        OPENED.append(split)\n{OPEN}") + NOTING)
    job = [*HELD, "train.duration=2ba", "run.name=first", "sink=[console,wandb]"]
    start = {
        "torchrun": [*TORCHRUN, "--nproc-per-node=2", "-m", "launcher", *job],
        "driver": [*LAUNCHER, *job, "launch.workers=2"],
    }
    run_command(start[way], tmp_path, WANDB_MODE="offline")
    at_first = [json.loads((tmp_path / f"first-{rank}.json").read_text()) for rank in (0, 1)]
    imported = [LATER.intersection(first["modules"]) for first in at_first]
    assert imported == [set(), set()]
    composes = [COMPOSING.intersection(first["modules"]) for first in at_first]
    assert composes == [COMPOSING if way == "torchrun" else set(), set()], "only rank 0 of a user's torchrun composes"
    asked_first = ["train", "val"] if way == "torchrun" else []  # rank 0 checks the request before it imports torch
    assert [first["opened"] for first in at_first] == [[*asked_first, "train", "val"], ["train", "val"]]
    assert all(first["collects"] and first["frozen"] > 100_000 for first in at_first)
