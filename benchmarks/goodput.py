"""Compare batch=goodput with fixed batches: seconds of training to a target accuracy, on the digits.

    python benchmarks/goodput.py                       # MLP, two workers, three seeds
    python benchmarks/goodput.py --recipe resnet --batches 32 64 128 256

All use the linear rule with the same base batch and learning rate. Update times are measured once beforehand, and an
earlier run at the base batch provides the noise scale that one of the two goodput variants starts from
(plan.noise=RUN). Seconds are training time only: they exclude the start of Python, and also validation, which runs
equally often per sample for every batch and would take much of such a short training.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launcher.system.jsonl import JsonlReader
from launcher.system.run_files import EVENTS_FILE, METRICS_FILE

WORKERS = 2
QUIET = ["train.validate_every=0.5ep", "sink=[]", "checkpoint.every=null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mlp")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-epochs", type=int, default=60)
    parser.add_argument("--tune-max", type=int, default=256)
    parser.add_argument("overrides", nargs="*", help="further overrides, after --")
    options = parser.parse_args()
    forms = {f"fixed {batch}": [f"batch.per_device={batch // WORKERS}"] for batch in options.batches}
    fixed = list(forms)
    forms["goodput"] = ["batch=goodput"]
    forms["noise known"] = ["batch=goodput", "plan.noise=before"]
    found: dict[str, list[float]] = {form: [] for form in forms}
    with tempfile.TemporaryDirectory() as folder:
        run_launcher(Path(folder), options, ["tune", "format=json"], ["batch=goodput", "tune.budget_s=40"])
        run_launcher(Path(folder), options, [], ["run.name=before", "seed=1000", "train.duration=150ba", *QUIET])
        for seed in range(options.seeds):
            for form, overrides in forms.items():
                found[form].append(train_to_target(Path(folder), options, [*overrides, f"seed={seed}"]))
    print(f"{options.recipe}: seconds to val/accuracy {options.target}")
    for form, times in found.items():
        print(f"{form:12} median {statistics.median(times):6.2f}   {' '.join(f'{time:.2f}' for time in times)}")
    medians = {form: statistics.median(times) for form, times in found.items()}
    best = min(fixed, key=medians.__getitem__)
    for form in forms.keys() - fixed:
        print(f"{form} takes {medians[form] / medians[best]:.2f} of the time of the best fixed batch ({best})")


def train_to_target(folder: Path, options: argparse.Namespace, overrides: Sequence[str]) -> float:
    """Seconds of training to the target; infinity if it was not reached."""
    run_dir = folder / f"run-{'-'.join(overrides).replace('=', '')}"
    target = [f"train.target.at_least={options.target}", "train.target.metric=val/accuracy"]
    more = [*target, "train.stop_at_target=true", f"train.duration={options.max_epochs}ep", f"run.dir={run_dir}"]
    run_launcher(folder, options, [], [*overrides, *more, "schedule=constant", *QUIET])
    events, rows = (list(JsonlReader(run_dir / name)) for name in (EVENTS_FILE, METRICS_FILE))
    changes = [event["global"] for event in events if event["event"] == "plan"]
    reached = [event for event in events if event["event"] == "target"]
    took, updates = (reached[0]["seconds"], reached[0]["update"]) if reached else (math.inf, 0)
    took -= sum(row["stage/other/ms"] for row in rows) / 1e3
    print(f"  {' '.join(overrides):40} {took:7.2f} s  {updates:5} updates  {changes}", flush=True)
    return float(took)


def run_launcher(folder: Path, options: argparse.Namespace, verb: Sequence[str], overrides: Sequence[str]) -> None:
    usual = [f"recipe={options.recipe}", f"launch.workers={WORKERS}", "launch.threads=1"]
    command = [sys.executable, "-m", "launcher", *verb, *usual, f"tune.max={options.tune_max}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options.overrides], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
