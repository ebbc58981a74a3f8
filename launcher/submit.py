"""Runs as Slurm jobs: the driver's submission, and the commands that a job script calls on its nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher import recipe as recipes
from launcher.batch import PlanError
from launcher.durable import private_folder
from launcher.errors import EXIT_FAILED, EXIT_OK, RequestError
from launcher.failure import consequence, those
from launcher.manifest import newest_of
from launcher.opening import decided, path_of
from launcher.queue import claim, claimed
from launcher.redact import redact
from launcher.runfolder import RunFolder
from launcher.settings import Run
from launcher.slurm import OUTPUT, node_range, render
from launcher.study import study
from launcher.tune.auto import stood_in

__all__ = ["again", "drive", "folder"]

TIMES = 3  # failures since the same checkpoint after which a job is not requeued


# --- driver -------------------------------------------------------------------------------------------------------


def drive(run: Run, words: Sequence[str]) -> int:
    """Submit the run as a Slurm job; with launch.dry=true only print the script.

    Raises:
        RequestError: the request is wrong, or sbatch rejects it; nothing was submitted.
    """
    text = render(run, [word for word in words if not word.startswith("launch.dry=")], sys.executable)
    examine(run, run.launch.workers and run.launch.workers * node_range(run.launch.nodes)[0])
    check_path(Path(run.run.dir or ""))
    if run.launch.dry:
        print(redact(text), end="")
        return EXIT_OK
    job = submitted(text)
    path = path_of(run, job, 1, job=job)
    found = RunFolder(path)
    if not (run.resume == "never" and found.run_yaml.exists()):  # the job will create a new directory beside it
        found.create()
        claim(found, job, newest_of(found.checkpoints_in(run.checkpoint.dir)))
    print(f"Slurm job {job}, in {path}")
    print(f"  watch    tail -F {OUTPUT.replace('%j', job)}")
    print(f"  status   launcher status {path.name if run.run.dir is None else path}")
    print(f"  stop     launcher stop {path.name if run.run.dir is None else path}")
    return EXIT_OK


def submitted(text: str) -> str:
    """Submit the script with sbatch; returns the job id."""
    private_folder(Path(OUTPUT).parent)
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RequestError("launch=slurm: sbatch is not on this machine: use a login node, or launch=local") from None
    if done.returncode != 0:
        raise RequestError(f"launch=slurm: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def examine(run: Run, world: int | None) -> None:
    """Check the recipe, its data and the plan; without a known `world` size a PlanError is ignored."""
    sizes = recipes.sizes(recipes.build(run.recipe))
    with suppress(*() if world else (PlanError,)):
        study(stood_in(run), sizes, world or 1)


# --- on the nodes -------------------------------------------------------------------------------------------------


def folder(run: Run, job: str | None, *, restarted: bool) -> Path:
    """Create the job's run directory and mark it as the job's; a restarted job gets its previous directory.

    Raises:
        RequestError: the request is wrong.
    """
    if job is None:
        raise RequestError("the folder command is for Slurm job scripts only: type sbatch slurm/train.sbatch ...")
    asked = path_of(run, job, 1, job=job)
    path = next((one for one in mine(asked, job) if restarted), None)
    if path is None:  # otherwise it was checked before; importing the recipe may take seconds
        examine(run, None)
        path = decided(run, asked)[1]
    check_path(path)
    found = RunFolder(path)
    found.create()
    claim(found, job, newest_of(found.checkpoints_in(run.checkpoint.dir)))
    return path


def check_path(path: Path) -> None:
    """Refuse paths with quotes or backslashes, since the scripts pass the path in single quotes."""
    if set("'\\\n") & set(str(path)):
        raise RequestError(f"run.dir={' '.join(str(path).split())} holds a quote or a backslash: type another run.dir=")


def mine(asked: Path, job: str) -> list[Path]:
    """Directories that belong to the job: `asked`, or numbered variants of it."""
    near = [asked, *asked.parent.glob(f"{asked.name}-*")]
    return [path for path in near if (kept := claimed(RunFolder(path))) is not None and kept["job"] == job]


def again(run_dir: str, job: str | None) -> int:
    """Return 0 if a failed job should be requeued, 1 (with an error message) if it would only fail again.

    A job is not requeued after three worker starts without a new checkpoint, or three failures of the same job since
    the same checkpoint. Pool tasks are counted separately: when the task with the rendezvous ends, all others fail
    once.
    """
    found = RunFolder(Path(run_dir))
    saved = found.saved_generation()
    failures = found.path / "slurm-failures"
    place = f"{saved} {job}"
    with failures.open("a") as file:
        file.write(f"{place}\n")
    jobs = failures.read_text().splitlines().count(place)
    starts = found.generation() - saved
    if max(jobs, starts) < TIMES:
        say(f"failed: requeued, attempt {jobs + 1} of {TIMES} from the same checkpoint")
        return EXIT_OK
    errors = [one for one in those(found.logs) if one.generation > saved and not consequence(one.message)]
    first = min(errors, key=lambda one: (one.generation, one.time), default=None)
    why = first.line() if first else "the workers were killed, or could not connect to each other"
    say(f"error: failed {TIMES} times since the same checkpoint, not requeued: {why}")
    return EXIT_FAILED


def say(text: str) -> None:
    print(redact(" ".join(text.split())), file=sys.stderr, flush=True)
