"""Runs as Slurm jobs: the driver's submission, and the commands that a job script calls on its nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher import recipe as recipes
from launcher.checkpoint.manifest import latest_id
from launcher.config.schema import RunConfig
from launcher.config.slurm_syntax import parse_node_range
from launcher.errors import EXIT_FAILED, EXIT_OK, UsageError
from launcher.goodput.auto_batch import with_placeholder_batch
from launcher.plan.batch import PlanError
from launcher.plan.training_plan import make_training_plan
from launcher.run_dir.failures import is_peer_failure, read_failures
from launcher.run_dir.open_run import resolve_directory, run_path
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.claim import read_claim, write_claim
from launcher.slurm.job_script import OUTPUT_PATTERN, render_sbatch_script
from launcher.system.atomic_files import make_private_dir
from launcher.system.redaction import mask_secrets
from launcher.system.stderr import print_stderr

__all__ = ["job_run_directory", "should_requeue", "submit_run"]

MAX_FAILURES_PER_CHECKPOINT = 3  # failures since the same checkpoint after which a job is not requeued


# --- driver -------------------------------------------------------------------------------------------------------


def submit_run(config: RunConfig, words: Sequence[str]) -> int:
    """Submit the run as a Slurm job; with launch.dry_run=true only print the script.

    Raises:
        UsageError: the request is wrong, or sbatch rejects it; nothing was submitted.
    """
    text = render_sbatch_script(
        config, [word for word in words if not word.startswith("launch.dry_run=")], sys.executable
    )
    validate_request(config, config.launch.workers and config.launch.workers * parse_node_range(config.launch.nodes)[0])
    check_script_path(Path(config.run.dir or ""))
    if config.launch.dry_run:
        print(mask_secrets(text), end="")
        return EXIT_OK
    job = run_sbatch(text)
    path = run_path(config, job, 1, job=job)
    found = RunDirectory(path)
    if not (config.resume == "never" and found.run_yaml.exists()):  # the job will create a new directory beside it
        found.create()
        write_claim(found, job, latest_id(found.resolve_checkpoints_dir(config.checkpoint.dir)))
    print(f"Slurm job {job}, in {path}")
    print(f"  watch    tail -F {OUTPUT_PATTERN.replace('%j', job)}")
    print(f"  status   launcher status {path.name if config.run.dir is None else path}")
    print(f"  stop     launcher stop {path.name if config.run.dir is None else path}")
    return EXIT_OK


def run_sbatch(text: str) -> str:
    """Submit the script with sbatch; returns the job id."""
    make_private_dir(Path(OUTPUT_PATTERN).parent)
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("launch=slurm: sbatch is not on this machine: use a login node, or launch=local") from None
    if done.returncode != 0:
        raise UsageError(f"launch=slurm: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def validate_request(config: RunConfig, world: int | None) -> None:
    """Check the recipe, its data and the plan; without a known `world` size a PlanError is ignored."""
    sizes = recipes.get_dataset_sizes(recipes.build_recipe(config.recipe))
    with suppress(*() if world else (PlanError,)):
        make_training_plan(with_placeholder_batch(config), sizes, world or 1)


# --- on the nodes -------------------------------------------------------------------------------------------------


def job_run_directory(config: RunConfig, job: str | None, *, restarted: bool) -> Path:
    """Create the job's run directory and mark it as the job's; a restarted job gets its previous directory.

    Raises:
        UsageError: the request is wrong.
    """
    if job is None:
        raise UsageError("the folder command is for Slurm job scripts only: type sbatch slurm/train.sbatch ...")
    asked = run_path(config, job, 1, job=job)
    path = next((one for one in directories_of_job(asked, job) if restarted), None)
    if path is None:  # otherwise it was checked before; importing the recipe may take seconds
        validate_request(config, None)
        path = resolve_directory(config, asked)[1]
    check_script_path(path)
    found = RunDirectory(path)
    found.create()
    write_claim(found, job, latest_id(found.resolve_checkpoints_dir(config.checkpoint.dir)))
    return path


def check_script_path(path: Path) -> None:
    """Refuse paths with quotes or backslashes, since the scripts pass the path in single quotes."""
    if set("'\\\n") & set(str(path)):
        raise UsageError(f"run.dir={' '.join(str(path).split())} holds a quote or a backslash: type another run.dir=")


def directories_of_job(asked: Path, job: str) -> list[Path]:
    """Directories that belong to the job: `asked`, or numbered variants of it."""
    near = [asked, *asked.parent.glob(f"{asked.name}-*")]
    return [path for path in near if (kept := read_claim(RunDirectory(path))) is not None and kept["job"] == job]


def should_requeue(run_dir: str, job: str | None) -> int:
    """Return 0 if a failed job should be requeued, 1 (with an error message) if it would only fail again.

    A job is not requeued after three worker starts without a new checkpoint, or three failures of the same job since
    the same checkpoint. Pool tasks are counted separately: when the task with the rendezvous ends, all others fail
    once.
    """
    found = RunDirectory(Path(run_dir))
    saved = found.read_saved_generation()
    failures = found.path / "slurm-failures"
    place = f"{saved} {job}"
    with failures.open("a") as file:
        file.write(f"{place}\n")
    jobs = failures.read_text().splitlines().count(place)
    starts = found.read_generation() - saved
    if max(jobs, starts) < MAX_FAILURES_PER_CHECKPOINT:
        print_stderr(f"failed: requeued, attempt {jobs + 1} of {MAX_FAILURES_PER_CHECKPOINT} from the same checkpoint")
        return EXIT_OK
    errors = [one for one in read_failures(found.logs) if one.generation > saved and not is_peer_failure(one.message)]
    first = min(errors, key=lambda one: (one.generation, one.time), default=None)
    why = first.summary() if first else "the workers were killed, or could not connect to each other"
    print_stderr(f"error: failed {MAX_FAILURES_PER_CHECKPOINT} times since the same checkpoint, not requeued: {why}")
    return EXIT_FAILED
