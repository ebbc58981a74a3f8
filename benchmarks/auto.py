"""Overhead of batch.per_device=auto besides the measuring itself: time from command to end, with and without it.

    python benchmarks/auto.py                 # 2 and 3 workers, with the driver and under torchrun
    python benchmarks/auto.py --workers 2 --rounds 5

Each round trains the same few updates with an explicit number, with auto that measures, and with auto that finds a
cached profile. The wall time that auto adds, minus the seconds spent on measuring (`spent_s` in its document), is the
cost of coordination, of starting the measuring processes and of the lookup. The CPU time that the lookup adds, over all
processes, is printed as well, as other programs on the machine affect it little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
OVERRIDES = ["recipe=mlp", "sink=[]", "train.duration=5ba", "tune.sizes=[8,16,32]", "tune.budget_s=3", "resume=never"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    header = f"{'workers':>7} {'started by':>10} {'number':>8} {'beside measuring':>17} {'cached':>7}"
    print(f"{header} {'cached, CPU':>11}")
    for workers in options.workers:
        for form in ("launcher", "torchrun"):
            rounds = [time_round(form, workers) for _ in range(options.rounds)]
            number, overhead, cached, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            each = " ".join(f"{times[1]:.1f}" for times in rounds)
            print(
                f"{workers:>7} {form:>10} {number:>6.1f} s {overhead:>+15.1f} s {cached:>+5.1f} s {cpu:>+9.1f} s"
                f"   ({each})",
                flush=True,
            )


def time_round(form: str, workers: int) -> tuple[float, float, float, float]:
    """Seconds with an explicit number, and what auto adds: besides measuring; with a cached profile (wall, CPU)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        number_s, number_cpu_s = time_command(form, workers, folder, "batch.per_device=16")
        measured_s, _ = time_command(form, workers, folder, "batch.per_device=auto")
        profile = json.loads(next((folder / "runs" / ".profiles").iterdir()).read_text())
        cached_s, cached_cpu_s = time_command(form, workers, folder, "batch.per_device=auto")
        overhead_s = measured_s - number_s - profile["found"]["spent_s"]
        return number_s, overhead_s, cached_s - number_s, cached_cpu_s - number_cpu_s


def time_command(form: str, workers: int, folder: Path, *overrides: str) -> tuple[float, float]:
    """Wall time of the command, and CPU time of it and all processes that it waited for."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if form == "launcher":
        command = [sys.executable, "-m", "launcher", *OVERRIDES, f"launch.workers={workers}", *overrides]
    else:
        command = [*TORCHRUN, f"--nproc-per-node={workers}", "-m", "launcher", *OVERRIDES, *overrides]
    subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu_s


if __name__ == "__main__":
    main()
