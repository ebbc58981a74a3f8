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
WORDS = ["recipe=mlp", "sink=[]", "train.duration=5ba", "tune.sizes=[8,16,32]", "tune.budget_s=3", "resume=never"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'workers':>7} {'started by':>10} {'typed':>8} {'beside measuring':>17} {'kept':>7} {'kept, CPU':>10}")
    for workers in options.workers:
        for form in ("launcher", "torchrun"):
            rounds = [one(form, workers) for _ in range(options.rounds)]
            typed, beside, kept, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            each = " ".join(f"{one[1]:.1f}" for one in rounds)
            print(
                f"{workers:>7} {form:>10} {typed:>6.1f} s {beside:>+15.1f} s {kept:>+5.1f} s {cpu:>+8.1f} s   ({each})",
                flush=True,
            )


def one(form: str, workers: int) -> tuple[float, float, float, float]:
    """Seconds with an explicit number, and what auto adds: besides measuring; with a cached profile (wall, CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        typed_s, typed_cpu_s = took_s(form, workers, here, "batch.per_device=16")
        measured_s, _ = took_s(form, workers, here, "batch.per_device=auto")
        profile = json.loads(next((here / "runs" / ".profiles").iterdir()).read_text())
        kept_s, kept_cpu_s = took_s(form, workers, here, "batch.per_device=auto")
        beside_s = measured_s - typed_s - profile["found"]["spent_s"]
        return typed_s, beside_s, kept_s - typed_s, kept_cpu_s - typed_cpu_s


def took_s(form: str, workers: int, here: Path, *words: str) -> tuple[float, float]:
    """Wall time of the command, and CPU time of it and all processes that it waited for."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if form == "launcher":
        command = [sys.executable, "-m", "launcher", *WORDS, f"launch.workers={workers}", *words]
    else:
        command = [*TORCHRUN, f"--nproc-per-node={workers}", "-m", "launcher", *WORDS, *words]
    subprocess.run(command, cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu_s


if __name__ == "__main__":
    main()
