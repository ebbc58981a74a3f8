"""Runs as Slurm jobs: the driver's submission, and the commands that a job script calls on its nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from launcher.run_dir.outward_links import refuse_outward_links
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.claim import read_claim, write_claim
from launcher.slurm.job_script import OUTPUT_PATTERN, render_sbatch_script
from launcher.system.atomic_files import make_durable_dir
from launcher.system.redaction import mask_secrets
from launcher.system.stderr import print_stderr

__all__ = ["compute_requeue_status", "create_job_directory", "submit_run"]

MAX_FAILURES_PER_CHECKPOINT = 3  # failures since the same checkpoint after which a job is not requeued


# --- driver -------------------------------------------------------------------------------------------------------


def submit_run(config: RunConfig, overrides: Sequence[str]) -> int:
    """Submit the run as a Slurm job; with launch.dry_run=true only print the script.

    Raises:
        UsageError: the request is wrong, or sbatch rejects it; nothing was submitted.
    """
    args = [override for override in overrides if not override.startswith("launch.dry_run=")]
    script = render_sbatch_script(config, args, sys.executable)
    min_nodes = parse_node_range(config.launch.nodes)[0]
    validate_request(config, config.launch.workers and config.launch.workers * min_nodes)
    check_script_path(Path(config.run.dir or ""))
    if config.launch.dry_run:
        print(mask_secrets(script), end="")
        return EXIT_OK
    job = run_sbatch(script)
    path = run_path(config, job, 1, job=job)
    run_dir = RunDirectory(path)
    if not (config.resume == "never" and run_dir.run_yaml.exists()):  # the job will create a new directory beside it
        claim_for_job(run_dir, job, config)
    run = path.name if config.run.dir is None else path
    print(f"Slurm job {job}, in {path}")
    print(f"  watch    tail -F {OUTPUT_PATTERN.replace('%j', job)}")
    print(f"  status   launcher status {run}")
    print(f"  stop     launcher stop {run}")
    return EXIT_OK


def run_sbatch(script: str) -> str:
    """Submit the script with sbatch; return the job id."""
    make_durable_dir(Path(OUTPUT_PATTERN).parent)
    try:
        completed = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UsageError("launch=slurm: sbatch is not on this machine: use a login node, or launch=local") from None
    if completed.returncode != 0:
        raise UsageError(f"launch=slurm: {' '.join(completed.stderr.split())}")
    return completed.stdout.strip().partition(";")[0]


def validate_request(config: RunConfig, world_size: int | None) -> Any:
    """Check the recipe, its data and the plan, and return the recipe; a PlanError needs a known world size."""
    recipe = recipes.build_recipe(config.recipe)
    sizes = recipes.get_dataset_sizes(recipe)
    with suppress(*() if world_size else (PlanError,)):
        make_training_plan(with_placeholder_batch(config), sizes, world_size or 1)
    return recipe


# --- on the nodes -------------------------------------------------------------------------------------------------


def create_job_directory(config: RunConfig, job: str | None, *, restarted: bool) -> Path:
    """Create the job's run directory and mark it as the job's; a restarted job gets its previous directory.

    Raises:
        UsageError: the request is wrong.
    """
    if job is None:
        raise UsageError("the folder command is for Slurm job scripts only: type sbatch slurm/train.sbatch ...")
    requested = run_path(config, job, 1, job=job)
    path = next(iter(find_job_directories(requested, job)), None) if restarted else None
    if path is None:  # otherwise it was checked before; importing the recipe may take seconds
        recipe = validate_request(config, None)
        path = resolve_directory(config, requested, recipes.find_unlearned_defaults(recipe))[1]
    check_script_path(path)
    claim_for_job(RunDirectory(path), job, config)
    return path


def claim_for_job(run_dir: RunDirectory, job: str, config: RunConfig) -> None:
    """Create the run directory and assign it to the job."""
    run_dir.create()
    write_claim(run_dir, job, latest_id(run_dir.resolve_checkpoints_dir(config.checkpoint.dir)))


def check_script_path(path: Path) -> None:
    """Refuse paths with quotes or backslashes, since the scripts pass the path in single quotes."""
    if set("'\\\n") & set(str(path)):
        raise UsageError(f"run.dir={' '.join(str(path).split())} holds a quote or a backslash: type another run.dir=")


def find_job_directories(requested: Path, job: str) -> list[Path]:
    """Directories that belong to the job: `requested`, or numbered variants of it."""
    candidates = [requested, *requested.parent.glob(f"{requested.name}-*")]
    claims = [(path, read_claim(RunDirectory(path))) for path in candidates]
    return [path for path, claim in claims if claim is not None and claim["job"] == job]


def compute_requeue_status(path: str, job: str | None) -> int:
    """Return 0 if a failed job should be requeued, 1 (with an error message) if it would only fail again.

    A job is not requeued after three worker starts without a new checkpoint, or three failures of the same job since
    the same checkpoint. Pool tasks are counted separately: when the task with the rendezvous ends, all others fail
    once.
    """
    run_dir = RunDirectory(Path(path))
    refuse_outward_links(run_dir.path)
    saved = run_dir.read_saved_generation()
    failures_file = run_dir.path / "slurm-failures"
    entry = f"{saved} {job}"
    with failures_file.open("a") as file:
        file.write(f"{entry}\n")
    job_failures = failures_file.read_text().splitlines().count(entry)
    starts = run_dir.read_generation() - saved
    limit = MAX_FAILURES_PER_CHECKPOINT
    if max(job_failures, starts) < limit:
        print_stderr(f"failed: requeued, attempt {job_failures + 1} of {limit} from the same checkpoint")
        return EXIT_OK
    failures = [failure for failure in read_failures(run_dir.logs) if failure.generation > saved]
    causes = [failure for failure in failures if not is_peer_failure(failure.message)]
    first = min(causes, key=lambda failure: (failure.generation, failure.time), default=None)
    cause = first.summary() if first else "the workers were killed, or could not connect to each other"
    print_stderr(f"error: failed {limit} times since the same checkpoint, not requeued: {cause}")
    return EXIT_FAILED
