"""The scripts of slurm/, unmodified, on a real Slurm: the training survives whatever happens to the nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher.errors import EXIT_USAGE
from launcher.slurm.job_script import SCRIPT_BODY
from launcher.sweep.points import quote_override
from tests.helpers import wandb_file
from tests.helpers.jobs import has_trained, make_env, max_parameter_difference, read_events, read_rows, wait_for
from tests.helpers.slurm_cluster import Slurm
from tests.helpers.small_job import HELD, LAUNCHER, RECIPE, run_launcher

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SCRIPTS = Path(__file__).parents[2] / "slurm"
LONG = [*HELD, "train.duration=100000ep", "checkpoint.every=200ba"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project root with a custom recipe."""
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


def env(**more: str) -> dict[str, str]:
    """An environment where `python` is this one, as with an activated virtual environment."""
    return make_env(**{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more})


def has_ended(slurm: Slurm, job: str) -> Callable[[], bool]:
    return lambda: slurm.get_job_state(job) in OVER


def read_output(project: Path, job: str) -> str:
    return (project / f"{job}.out").read_text()


def test_two_nodes_equal_one_process(slurm: Slurm, project: Path) -> None:
    script = str(SCRIPTS / "train.sbatch")
    job = slurm.submit(script, *HELD, "train.precision=fp64", cwd=project, env=env())
    wait_for(has_ended(slurm, job))
    assert slurm.get_job_state(job) == "COMPLETED", read_output(project, job)
    run_dir = project / f"runs/own-{job}"
    assert (run_dir / "done.json").exists()
    assert read_events(run_dir, "start")[0]["nodes"] == 2
    run_launcher(project, *HELD, "train.precision=fp64", "run.name=one")
    assert max_parameter_difference(run_dir, project / "runs/one") <= 1e-10


def saved(run_dir: Path) -> bool:
    return any(run_dir.glob("checkpoints/update-*/manifest.json"))


def assert_each_update_once(run_dir: Path) -> None:
    """Assert that no update is lost and none is trained twice."""
    updates = [row["update"] for row in read_rows(run_dir)]
    assert updates == list(range(1, len(updates) + 1))


def started(run_dir: Path, times: int) -> Callable[[], bool]:
    """Whether the workers have been started this often, and have trained since."""

    def state() -> bool:
        found = read_rows(run_dir)
        return bool(found) and found[-1]["generation"] == times and len(read_events(run_dir, "start")) == times

    return state


def run_on_slurm(slurm: Slurm, project: Path, *words: str, status: int = 0) -> str:
    """Return the output of the launcher, run where Slurm's commands are available."""
    done = run_launcher(project, *words, status=status, **slurm.env)
    return done.stdout + done.stderr


def test_five_preemptions_lose_and_repeat_nothing(slurm: Slurm, project: Path) -> None:
    """Jobs of a higher partition take the nodes; then the user stops the run, which is not requeued."""
    script = str(SCRIPTS / "train.sbatch")
    job = slurm.submit("--nodes=1", script, *LONG, "run.name=p", cwd=project, env=env())
    run_dir = project / "runs/p"
    for times in range(1, 6):
        wait_for(started(run_dir, times))
        above = slurm.submit("--partition=high", "--nodes=3", "--exclusive", "--wrap=true", cwd=project, env=env())
        wait_for(has_ended(slurm, above))
        assert slurm.get_job_state(above) == "COMPLETED"
        assert len(read_events(run_dir, "preempt")) == times
    wait_for(started(run_dir, 6))
    assert "Slurm job" in run_on_slurm(slurm, project, "status", "p")
    run_on_slurm(slurm, project, "stop", "p")
    assert slurm.get_job_state(job) == "COMPLETED"
    assert_each_update_once(run_dir)


def test_time_limit_requeues_one_wandb_run(slurm: Slurm, project: Path) -> None:
    own = [*(word for word in LONG if word != "sink=[]"), "sink=wandb", "run.name=t"]
    offline = env(WANDB_MODE="offline")
    job = slurm.submit("--time=2", str(SCRIPTS / "train.sbatch"), *own, cwd=project, env=offline)
    run_dir = project / "runs/t"
    wait_for(started(run_dir, 1))
    slurm.run_client("scontrol", "update", f"jobid={job}", "timelimit=1")
    wait_for(lambda: slurm.show_job(job)["Restarts"] == "1")
    assert_each_update_once(run_dir)
    wait_for(started(run_dir, 2))
    run_on_slurm(slurm, project, "stop", "t")
    assert_each_update_once(run_dir)
    one_wandb_run(run_dir)


def one_wandb_run(run_dir: Path) -> None:
    """Every start wrote its own offline file, all with the same run id, and none repeats an update."""
    files = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    ids = {record.run.run_id for path in files for record in wandb_file.read_records(path) if record.HasField("run")}
    assert ids == {(run_dir / "wandb-id").read_text().strip()}
    updates = [row["update"] for path in files for row in wandb_file.read_rows(path) if "train/loss" in row]
    assert updates == sorted(set(updates))


def test_job_failing_three_times_is_not_requeued(slurm: Slurm, project: Path) -> None:
    script = str(SCRIPTS / "train.sbatch")
    job = slurm.submit("--nodes=1", script, *HELD, "+recipe.fail_on=0", cwd=project, env=env())
    wait_for(has_ended(slurm, job))
    assert slurm.get_job_state(job) == "FAILED"
    last = read_output(project, job).splitlines()[-1]
    assert last.startswith("error: failed 3 times since the same checkpoint, not requeued: rank 0 failed in own.py:")
    assert "boom" in last
    assert slurm.show_job(job)["Restarts"] == "0", "torchrun has tried three times in the first job"


def test_wrong_request_ends_the_job(slurm: Slurm, project: Path) -> None:
    job = slurm.submit(str(SCRIPTS / "elastic.sbatch"), *HELD, "batch.global=900", cwd=project, env=env())
    wait_for(has_ended(slurm, job))
    assert slurm.show_job(job)["ExitCode"] == "2:0"
    [line] = [line for line in read_output(project, job).splitlines() if line.startswith("error: ")]
    assert "batch.global=900 exceeds the 203 training samples" in line
    assert not (project / "runs").exists()


def test_job_survives_a_lost_node(slurm: Slurm, project: Path) -> None:
    """All three idle nodes, then two: the batch is constant, the event describes the change, lost work is repeated."""
    own = [*LONG, "run.name=e", "checkpoint.every=3ba"]
    job = slurm.submit(str(SCRIPTS / "elastic.sbatch"), *own, cwd=project, env=env())
    run_dir = project / "runs/e"
    wait_for(lambda: saved(run_dir))
    assert slurm.show_job(job)["NumNodes"] == "3", "--nodes=1-3 takes the nodes that are idle"
    try:
        slurm.kill_node("node3")
        wait_for(started(run_dir, 2))
    finally:
        slurm.restore_node("node3")
    assert slurm.get_job_state(job) == "RUNNING"
    [resize] = read_events(run_dir, "resize")
    assert (resize["from"]["shares"], resize["to"]["shares"]) == ([17, 17, 16], [25, 25])
    assert resize["why"] == "3 workers before, 2 now"
    run_on_slurm(slurm, project, "stop", "e")
    assert slurm.get_job_state(job) in ("COMPLETED", "NODE_FAIL")
    found = read_rows(run_dir)
    assert {row["batch/global"] for row in found} == {50}
    assert {row["update"] for row in found} == set(range(1, max(row["update"] for row in found) + 1))


def test_submitted_range_takes_the_idle_nodes(slurm: Slurm, project: Path) -> None:
    """Three nodes for launch.nodes=1-3, by what Slurm allocates to a job with these options."""
    shown = run_on_slurm(slurm, project, *HELD, "launch=slurm", "launch.nodes=1-3", "launch.dry_run=true")
    options = [line.removeprefix("#SBATCH ") for line in shown.splitlines() if line.startswith("#SBATCH ")]
    job = slurm.submit(*options, "--output=/dev/null", "--wrap=true", cwd=project, env=env())
    wait_for(has_ended(slurm, job))
    assert slurm.show_job(job)["NumNodes"] == "3"


def test_copies_by_srun_are_refused(slurm: Slurm, project: Path) -> None:
    """Each copy would train alone; the job's own number of tasks does not matter where srun starts one."""
    argv = ["srun", "--ntasks=2", "--nodes=1", *LAUNCHER, *HELD]
    done = subprocess.run(argv, cwd=project, env=env(**slurm.env), capture_output=True, text=True, check=False)
    assert "srun started 2 copies of this command" in done.stderr
    assert "one task per node" in done.stderr
    assert done.returncode == EXIT_USAGE
    assert not (project / "runs").exists()
    argv = ["salloc", "--ntasks-per-node=2", "srun", "--ntasks=1", *LAUNCHER, *HELD, "train.duration=1ep"]
    subprocess.run(argv, cwd=project, env=env(**slurm.env), capture_output=True, text=True, check=True)
    [run_dir] = (project / "runs").glob("own-*")
    assert re.fullmatch(r"own-\d{8}-\d{6}", run_dir.name), "named by its time, since the allocation may have more runs"


def test_only_a_batch_script_gives_the_job_its_name(slurm: Slurm, project: Path) -> None:
    """Also for the tasks that it starts, and whatever the user's own ENVIRONMENT is."""
    code = "from launcher import topology; print(topology.get_batch_job_id(), topology.get_slurm_step_id())"
    show = shlex.join([sys.executable, "-c", code])
    script = f"{show}; srun --ntasks=1 {show}"
    job = slurm.submit("--ntasks-per-node=2", "--wrap", script, cwd=project, env=env(ENVIRONMENT="mine"))
    wait_for(has_ended(slurm, job))
    assert read_output(project, job).splitlines() == [f"{job} None", f"{job} {job}.0"]
    argv = ["salloc", "--job-name=mine", "bash", "-c", f"{script}; echo $SLURM_JOB_ID"]
    done = subprocess.run(argv, cwd=project, env=env(**slurm.env), capture_output=True, text=True, check=True)
    shell, step, job = done.stdout.splitlines()
    assert (shell, step) == ("None None", f"None {job}.0")


def test_pool_grows_and_survives_its_rendezvous_node(slurm: Slurm, project: Path) -> None:
    """Tasks of two arrays, one with two workers: shares as for four workers. Joining costs no update."""
    script = str(SCRIPTS / "pool.sbatch")
    job = slurm.submit("--exclusive", "--array=0-1%1", script, *LONG, "run.name=pool", cwd=project, env=env())
    run_dir = project / "runs/pool"
    wait_for(lambda: bool(read_rows(run_dir)))
    assert read_rows(run_dir)[-1]["world"] == 1
    slurm.run_client("scontrol", "update", f"jobid={job}", "arraytaskthrottle=2")
    more = env(LAUNCHER_WORKERS="2")
    slurm.submit("--exclusive", "--array=0-0", script, *LONG, "run.name=pool", cwd=project, env=more)
    wait_for(lambda: read_rows(run_dir)[-1]["world"] == 4)
    assert_each_update_once(run_dir)
    before = read_rendezvous_node(run_dir)
    [first] = [
        line.split()[0] for line in slurm.run_client("squeue", "-h", "-o", "%i %N").splitlines() if before in line
    ]
    assert first == f"{job}_0", "the first task serves the rendezvous"
    slurm.run_client("scancel", first)
    wait_for(lambda: read_rows(run_dir)[-1]["world"] == 3 and read_rendezvous_node(run_dir) != before)
    run_on_slurm(slurm, project, "stop", "pool")
    found = read_rows(run_dir)
    assert {row["batch/global"] for row in found} == {50}
    assert {row["update"] for row in found} == set(range(1, found[-1]["update"] + 1))
    resizes = read_events(run_dir, "resize")
    assert resizes[0]["from"]["world"] == 1
    assert sorted(next(event for event in resizes if event["to"]["world"] == 4)["to"]["shares"]) == [12, 12, 13, 13]
    assert not [event for event in read_events(run_dir, "alarm") if event["kind"] == "gate"]


def read_rendezvous_node(run_dir: Path) -> str:
    """Return the node of the pool's rendezvous."""
    return (run_dir / "rendezvous").read_text().partition(":")[0] if (run_dir / "rendezvous").exists() else ""


HOSTILE = "a b'; touch hacked; echo \"$(touch hacked)`touch hacked` \\ # %j é"


def test_launch_slurm_passes_any_value_unchanged(slurm: Slurm, project: Path) -> None:
    """Values with shell and Slurm metacharacters reach the training unchanged and execute nothing."""
    own = [*HELD, "launch=slurm", "launch.nodes=2", "launch.time=10min", "run.dir=here and/there $HOME"]
    own = [*own, f"launch.env.MARK={quote_override(HOSTILE)}", f"sink.wandb.group={quote_override(HOSTILE)}"]
    own.remove("sink=[]")
    shown = run_on_slurm(slurm, project, *own, "launch.dry_run=true")
    assert "#SBATCH --nodes=2\n" in shown
    assert "#SBATCH --time=10\n" in shown
    assert sorted(path.name for path in project.iterdir()) == ["own.py"], "a dry run leaves nothing behind"
    printed = run_on_slurm(slurm, project, *own)
    job = printed.partition("Slurm job ")[2].partition(",")[0]
    wait_for(has_ended(slurm, job))
    run_dir = project / "here and/there $HOME"
    assert (run_dir / "done.json").exists(), (project / f"runs/.slurm/{job}.out").read_text()
    assert not (project / "hacked").exists()
    kept = yaml.safe_load((run_dir / "run.yaml").read_text())
    assert kept["launch"]["env"]["MARK"] == HOSTILE
    assert kept["sink"]["wandb"]["group"] == HOSTILE
    assert "complete" in run_on_slurm(slurm, project, "status", str(run_dir))
    assert "sbatch is not on this machine" in run_launcher(project, *own, status=2, PATH="/nowhere").stderr


def test_submitit_sweep_continues_past_failed_points(slurm: Slurm, project: Path) -> None:
    """Failed points are shown, and the others finish."""
    if os.environ.get("LAUNCHER_NEEDS_SLURM") is None:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    own = ["-m", *HELD, "train.duration=1ep", "run.name=s", "recipe.fail_on=-1,0", "seed=0,1", "elastic.max_restarts=0"]
    through = ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1"]
    own = [word.replace("recipe.fail_on", "+recipe.fail_on") for word in own]
    printed = run_on_slurm(slurm, project, *own, *through, status=1)
    lines = [line.split() for line in printed.splitlines() if line[:4].strip() in {"0", "1", "2", "3"}]
    assert [line[3] == "failed" for line in lines] == [False, False, True, True]
    assert [(project / f"runs/s/{point}/done.json").exists() for point in range(4)] == [True, True, False, False]
    starts = [len(read_events(project / f"runs/s/{point}", "start")) for point in (0, 1)]
    assert starts == [1, 1]
    assert "time-optimal: point" in printed
    assert "accuracy-optimal: point" in printed


def test_array_tasks_share_a_sweep(slurm: Slurm, project: Path) -> None:
    own = [*HELD, "train.duration=1ep", "seed=0,1", "run.name=a"]
    job = slurm.submit(str(SCRIPTS / "sweep.sbatch"), *own, cwd=project, env=env())
    wait_for(lambda: all((project / f"runs/a/{point}/done.json").exists() for point in range(2)))
    wait_for(lambda: not slurm.run_client("squeue", "-h", "-t", "R,PD", "-j", job))
    assert "not run" in read_output(project, job)


def test_scripts_are_sound() -> None:
    """The scripts pass bash and shellcheck, and end like the ones that launch=slurm submits."""
    scripts = sorted(SCRIPTS.glob("*.sbatch"))
    assert [path.stem for path in scripts] == ["elastic", "pool", "sweep", "train"]
    for path in scripts:
        subprocess.run(["bash", "-n", path], check=True)
        assert ("elastic" in path.stem or "train" in path.stem) == path.read_text().endswith(SCRIPT_BODY)
    if shutil.which("shellcheck") or os.environ.get("LAUNCHER_NEEDS_SLURM"):
        subprocess.run(["shellcheck", *scripts], check=True)


def test_watch_shows_a_waiting_and_requeued_job(slurm: Slurm, project: Path) -> None:
    run, out = project / "runs/s", project / "watched.txt"
    above = ["--partition=high", "--nodes=3", "--exclusive"]
    blocker = slurm.submit(*above, "--wrap=sleep 600", cwd=project, env=env())
    wait_for(lambda: slurm.get_job_state(blocker) == "RUNNING")
    run_on_slurm(slurm, project, *LONG, "launch=slurm", "launch.workers=1", "run.name=s")
    job = json.loads((run / "slurm.json").read_text())["job"]
    with out.open("w") as file:
        argv = [*LAUNCHER, "watch", "s"]
        watching = subprocess.Popen(argv, cwd=project, env=env(**slurm.env), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: re.search(rf"Slurm job {job}, PENDING .*waiting for it to start", out.read_text()))
        slurm.run_client("scancel", blocker)
        wait_for(lambda: "Own on 1 worker\n" in out.read_text())
        wait_for(has_trained(run))
        short = slurm.submit(*above, "--wrap=true", cwd=project, env=env())
        wait_for(lambda: "Own on 1 worker · start 2\n" in out.read_text())
        assert slurm.get_job_state(short) == "COMPLETED"
        assert watching.poll() is None
        run_on_slurm(slurm, project, "stop", "s")
        assert watching.wait(timeout=200) == 0
    finally:
        watching.kill()
        watching.wait()
    text = out.read_text()
    assert len(read_events(run, "preempt")) == text.count("\nstopped at update") == 2
    assert [event["why"] for event in read_events(run, "preempt")][-1] == "launcher stop"
    assert "runs/s is not running: at update" in text.splitlines()[-1]
