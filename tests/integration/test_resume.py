"""A job that was stopped, killed or finished continues from its checkpoints and ends like an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.jobs import max_parameter_difference, read_events, read_rows
from tests.helpers.small_job import HELD, RECIPE, run_launcher

pytestmark = pytest.mark.slow

#: Dropout and augmentation depend on the position only, so no RNG state is saved.
JOB = [*HELD, "+recipe.drop=0.3", "launch.workers=2", "optimizer=adamw", "lr.base=0.01", "schedule=cosine"]
JOB += ["checkpoint.every=1ep", "checkpoint.keep=9"]


def inject(*faults: str) -> dict[str, str]:
    return {"LAUNCHER_TEST_FAULTS": "1", "FAULT": ",".join(faults)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the undisturbed reference run, runs/whole."""
    path = tmp_path_factory.mktemp("resume")
    (path / "own.py").write_text(RECIPE)
    run_launcher(path, *JOB, "run.name=whole")
    return path


@pytest.mark.core
@pytest.mark.parametrize("late", ["", "1"], ids=["", "statistics are read late"])
def test_stop_and_kills_change_nothing(folder: Path, late: str) -> None:
    """Stopped once and resumed by the same command, then killed twice."""
    killed = folder / f"runs/killed{late}"
    kills = inject("stop@forward:1:7:1", "kill@backward:1:12:2", "kill@forward:0:19:3") | {"READ_STATS_LATE": late}
    killed.mkdir(parents=True)
    run_launcher(folder, *JOB, f"run.name=killed{late}", **kills)
    assert read_events(killed, "preempt")
    assert not (killed / "done.json").exists()
    stopped = [row["update"] for row in read_rows(killed)]
    assert stopped == list(range(1, len(stopped) + 1))
    run_launcher(folder, *JOB, f"run.name=killed{late}", **kills)
    resumed = [row["update"] for row in read_rows(killed) if row["generation"] == 2]
    assert resumed[0] == stopped[-1] + 1, "the stop loses no update and repeats none"
    assert {row["update"] for row in read_rows(killed)} == set(range(1, 26)), "no row is missing"
    assert max_parameter_difference(folder / "runs/whole", killed) == 0.0
    assert [event["generation"] for event in read_events(killed, "start")] == [1, 2, 3, 4]
    done = json.loads((killed / "done.json").read_text())
    assert done["restarts"] == 2
    assert done["recovery_s"] > 0
    assert done["lost_samples"] > 0, "the updates since the checkpoint are run again, which is logged"


KILLS = [
    *("start:1:0", "rendezvous:1:0", "restore:0:0", "data:1:7", "forward:0:8", "backward:1:9", "sync:0:9"),
    *("optimizer:1:10", "checkpoint-write:0:10", "checkpoint-rename:0:10", "validate:1:15", "finish:0:0"),
]


def was_injected(run_dir: Path, fault: str) -> bool:
    """Whether the rank of a fault logged that the fault was triggered."""
    rank, generation = fault.split(":")[1], fault.split(":")[3]
    return f"injected fault: {fault}\n" in (run_dir / f"logs/rank{rank}-g{generation}.log").read_text()


def test_kill_in_every_phase_changes_nothing(folder: Path) -> None:
    """One job, killed twelve times at different points; every sample of every epoch counts once."""
    kills = [f"kill@{where}:{start}" for start, where in enumerate(KILLS, start=1)]
    run_launcher(folder, *JOB, "elastic.max_restarts=20", "run.name=phases", **inject(*kills))
    killed, whole = folder / "runs/phases", folder / "runs/whole"
    assert [kill for kill in kills if not was_injected(killed, kill)] == []
    assert (killed / "generation").read_text() == "13\n", (
        "each of them ended one start of the workers, nothing else did"
    )
    assert json.loads((killed / "done.json").read_text())["restarts"] == 12
    assert max_parameter_difference(whole, killed) == 0.0
    last = {row["update"]: row.get("train/loss") for row in read_rows(killed)}
    assert [last[update] for update in range(1, 26)] == [row["train/loss"] for row in read_rows(whole)]
    assert not read_events(killed, "error"), "a rank that lost a peer has no error of its own"


def test_named_checkpoint_counts_until_the_first_save(folder: Path) -> None:
    """The workers die before the first save: resuming the newest checkpoint or starting fresh would be wrong."""
    named = "resume=runs/whole/checkpoints/update-00000010"
    run_launcher(folder, *JOB, "run.name=named", named, **inject("kill@forward:0:12"))
    assert [event["update"] for event in read_events(folder / "runs/named", "resume")] == [10, 10]
    assert read_rows(folder / "runs/named")[0]["update"] == 11
    assert max_parameter_difference(folder / "runs/whole", folder / "runs/named") == 0.0


def test_finished_run_reports_and_continues_if_longer(folder: Path) -> None:
    """Its newest checkpoint is damaged in between: the one before is used instead, with an alarm."""
    run_dir = folder / "runs/x"
    shutil.copytree(folder / "runs/whole", run_dir)
    again = run_launcher(folder, *JOB, "run.name=x")
    assert "is complete" in again.stdout
    other = run_launcher(folder, *JOB, "run.name=x", "seed=3", status=2)
    assert "seed (0 before, 3 now)" in other.stderr
    newest = damage_newest_checkpoint(run_dir)
    run_launcher(folder, *JOB, "run.name=x", "train.duration=6ep")
    assert newest in read_events(run_dir, "alarm")[0]["detail"]
    assert read_rows(run_dir)[-1]["samples"] == 6 * 203
    assert json.loads((run_dir / "done.json").read_text())["samples"] == 6 * 203
    run_launcher(folder, *JOB, "run.name=x", "seed=3", "resume=never", "train.duration=1ep")
    assert (folder / "runs/x-2/done.json").exists()


def test_mistyped_metric_is_refused_before_training_and_a_complete_run_stays_complete(workdir: Path) -> None:
    """The right name makes no difference to what is trained, though one batch is validated for it at the start."""
    job = [*HELD, "+recipe.drop=0.3", "launch.workers=2", "train.target.at_least=0.01"]
    run_launcher(workdir, *HELD, "+recipe.drop=0.3", "launch.workers=2", "run.name=plain", "train.duration=1ep")
    wrong = run_launcher(workdir, *job, "run.name=new", "train.target.metric=val/rigth", status=2).stderr
    assert (
        "train.target.metric=val/rigth is not measured in validation: did you mean train.target.metric=val/right?"
        in (wrong.splitlines()[-1])
    )
    assert not (workdir / "runs/new").exists()
    longer = [*job, "run.name=plain", "train.duration=2ep"]
    run_launcher(workdir, *longer, "train.target.metric=val/rigth", status=2)
    assert json.loads((workdir / "runs/plain/done.json").read_text())["samples"] == 203
    run_launcher(workdir, *job, "run.name=new", "train.duration=1ep", "train.target.metric=val/right")
    assert read_events(workdir / "runs/new", "target")
    assert max_parameter_difference(workdir / "runs/plain", workdir / "runs/new") == 0.0


@pytest.mark.core
def test_data_of_another_length_is_refused_and_data_that_moved_is_an_event(workdir: Path) -> None:
    text = RECIPE.replace("import dataclass", "import dataclass, field")
    text = text.replace('Noisy(203 if split == "train" else 5)', "Noisy(self.train if split == 'train' else self.val)")
    unlearned = 'field(default={}, metadata={{"learned": False}})'
    fields = [f"    {name}: int = {unlearned.format(size)}\n" for name, size in (("train", 203), ("val", 5))]
    fields += [f"    path: str = {unlearned.format(repr('/old'))}\n", "    def model"]
    (workdir / "own.py").write_text(text.replace("    def model", "".join(fields), 1))
    run_dir, job = workdir / "runs/x", [*HELD, "run.name=x", "batch.per_device=50"]
    run_launcher(workdir, *job, "train.duration=1ep")
    for length, duration in ((204, "2ep"), (100, "1ep")):
        other = [*job, f"recipe.train={length}", f"train.duration={duration}"]
        refused = run_launcher(workdir, *other, status=2).stderr
        assert f"{length} samples now, and had 203 when runs/x/checkpoints/update-00000005 was saved" in refused
    assert (run_dir / "done.json").exists(), "a refused request changes nothing"
    assert len(read_events(run_dir, "start")) == 1
    run_launcher(workdir, *job, "train.duration=2ep", "recipe.val=9", "recipe.path=/new")
    [resumed] = read_events(run_dir, "resume")
    assert resumed["changed"]["recipe.path"] == ["/old", "/new"]
    [alarm] = read_events(run_dir, "alarm")
    assert alarm["kind"] == "data"
    assert "the validation data has 9 samples now, and had 5" in alarm["detail"]
    assert json.loads((run_dir / "done.json").read_text())["samples"] == 2 * 203


def damage_newest_checkpoint(run_dir: Path) -> str:
    """Change one byte of the newest checkpoint's model, and return the checkpoint's name."""
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    return newest.name


def test_second_job_on_a_run_folder_is_refused(workdir: Path) -> None:
    from launcher.run_dir.run_directory import RunDirectory

    run_dir = RunDirectory(workdir / "runs/x")
    run_dir.create()
    lock = run_dir.lock()
    try:
        refused = run_launcher(workdir, *HELD, "run.name=x", status=2)
    finally:
        lock.release()
    assert f"in use by process {os.getpid()}" in refused.stderr
