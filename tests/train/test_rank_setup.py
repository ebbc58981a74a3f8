"""What a rank checks before it joins the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher.checkpoint.tensor_io import SaveOptions, save_checkpoint
from launcher.config.compose import compose
from launcher.errors import UsageError
from launcher.run_dir.run_directory import RunDirectory
from launcher.topology import Topology
from launcher.train.job_spec import JobSpec
from launcher.train.rank_setup import prepare_rank
from tests.helpers.checkpoints import make_state
from tests.helpers.small_job import OWN, RECIPE

OWN_SAMPLES = 203


COUNTING = f"OPENED = []\n{RECIPE}".replace(
    "        return Noisy(", "        OPENED.append(split)\n        return Noisy("
)
SIZED = f"{COUNTING}\n    def size(self, split):\n        return 203 if split == 'train' else 5\n"


@pytest.fixture
def job_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    (tmp_path / "own.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return JobSpec(compose([*OWN, "sink=[]"]), RunDirectory(tmp_path / "run"))


@pytest.mark.parametrize(
    ("facts", "refused"),
    [({"data": {"train": 202, "val": 5}}, True), ({"data": {"train": OWN_SAMPLES, "val": 7}}, False), ({}, False)],
    ids=["other length", "other validation data", "not stored"],
)
def test_restart_on_training_data_of_another_length_is_refused(
    job_spec: JobSpec, facts: dict[str, object], refused: bool
) -> None:
    saved = save_checkpoint(job_spec.run_dir.checkpoints, "update-00000003", make_state(3, **facts), SaveOptions(1))
    if refused:
        with pytest.raises(UsageError, match=rf"{OWN_SAMPLES} samples now, and had 202 when {saved.path} was saved"):
            prepare_rank(job_spec, Topology())
    else:
        assert prepare_rank(job_spec, Topology()).checkpoint is not None


@pytest.mark.parametrize("recipe", [COUNTING, SIZED], ids=["without sizes", "with sizes"])
def test_each_data_set_is_opened_once(job_spec: JobSpec, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "own.py").write_text(recipe)
    setup = prepare_rank(job_spec, Topology())
    assert sys.modules["own"].OPENED == ["train", "val"]
    assert (len(setup.datasets.train), len(setup.datasets.val)) == (setup.sizes.train, setup.sizes.val)
