"""Compare the launcher with a plain hand-written script: steady throughput, and time to the first update.

    python benchmarks/overhead.py                      # the resnet on digits with two workers
    python benchmarks/overhead.py --width 64 --updates 80   # updates of 50 ms and more
    python benchmarks/overhead.py --recipe gpt --strategy fsdp
    python benchmarks/overhead.py --recipe gpt --strategy fsdp --cpu   # CPU time, for a shared machine

Both train the same model on the same data with the same batch; the launcher with its defaults (all-gather of rank
statistics, stage clock, JSONL, console, wandb offline). Runs alternate, so that drift of the machine favours neither;
the printed values are medians of the ratios within each pair. CPU time covers all processes of a job; the time of a
short run is subtracted from that of a long one, so that startup is excluded.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launcher.system.jsonl import JsonlReader
from launcher.system.run_files import METRICS_FILE

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run_plain(options: argparse.Namespace, folder: Path) -> tuple[float, float]:
    out = folder / "plain.json"
    argv = [*TORCHRUN, f"--nproc-per-node={options.workers}", str(HERE / "plain_ddp.py"), f"--recipe={options.recipe}"]
    argv += [f"--per-device={options.per_device}", f"--updates={options.updates}", f"--skip={options.skip}"]
    argv += [f"--out={out}", f"--strategy={options.strategy}"] + ([f"--width={options.width}"] if options.width else [])
    start = time.time()
    run(argv, folder)
    found = json.loads(out.read_text())
    return statistics.fmean(found["update_s"]), found["first_update_at"] - start


def run_launcher(options: argparse.Namespace, folder: Path, driver: bool) -> tuple[float, float]:
    world = options.workers
    overrides = [
        f"recipe={options.recipe}",
        f"batch.per_device={options.per_device}",
        f"lr.base_batch={options.per_device * world}",
        f"train.duration={options.updates}ba",
        f"strategy={options.strategy}",
        "optimizer=sgd",
        "train.clip_norm=null",
        "schedule.warmup=0ep",
        "data.tail=carry",
        "train.validate_every=null",
        "checkpoint.every=null",
        f"run.dir={folder / f'run{time.time_ns()}'}",
        *([f"recipe.width={options.width}"] if options.width else []),
        *options.overrides,
    ]
    if driver:
        argv = [sys.executable, "-m", "launcher", *overrides, f"launch.workers={world}"]
    else:
        argv = [*TORCHRUN, f"--nproc-per-node={world}", "-m", "launcher", *overrides]
    start = time.time()
    run(argv, folder)
    run_dir = Path(next(o for o in overrides if o.startswith("run.dir=")).partition("=")[2])
    rows = list(JsonlReader(run_dir / METRICS_FILE))
    walls = [row["batch/global"] / row["throughput/samples_per_s"] for row in rows[options.skip : -1]]
    return statistics.fmean(walls), rows[0]["time"] - start


def measure_cpu_s(job: Callable[[], object]) -> float:
    """CPU time of the processes that `job` starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    job()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare_cpu_times(options: argparse.Namespace) -> None:
    ratios = []
    for _ in range(options.pairs):
        per_update_ms = []
        for job in (run_plain, partial(run_launcher, driver=False)):
            with tempfile.TemporaryDirectory() as name:
                lengths = (options.skip + 2, options.skip + 2 + options.updates)
                sizes = [argparse.Namespace(**{**vars(options), "updates": length}) for length in lengths]
                short_s, long_s = (measure_cpu_s(partial(job, size, Path(name))) for size in sizes)
            per_update_ms.append((long_s - short_s) / options.updates * 1e3)
        ratios.append(per_update_ms[1] / per_update_ms[0])
        print(f"CPU ms per update: plain {per_update_ms[0]:.1f}, launcher {per_update_ms[1]:.1f}: {ratios[-1]:.3f}")
    print(f"median {statistics.median(ratios):.3f}")


def run(argv: list[str], folder: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def compare_wall_times(options: argparse.Namespace) -> None:
    kinds = ("throughput", "throughput, driver", "first update", "first update, driver")
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    seconds: list[tuple[float, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(options.pairs):
            plain_s, plain_first_s = run_plain(options, Path(name))
            own_s, own_first_s = run_launcher(options, Path(name), driver=False)
            driver_s, driver_first_s = run_launcher(options, Path(name), driver=True)
            ratios["throughput"].append(plain_s / own_s)
            ratios["throughput, driver"].append(plain_s / driver_s)
            ratios["first update"].append(own_first_s / plain_first_s)
            ratios["first update, driver"].append(driver_first_s / plain_first_s)
            seconds.append((plain_s * 1e3, own_s * 1e3, driver_s * 1e3, plain_first_s, own_first_s, driver_first_s))
    names = ("plain ms/update", "torchrun -m launcher", "launcher", "plain s to first", "torchrun", "launcher")
    for name, column in zip(names, zip(*seconds, strict=True), strict=True):
        print(f"{name:24} median {statistics.median(column):8.2f}   {' '.join(f'{v:.2f}' for v in column)}")
    for name, values in ratios.items():
        print(f"{name:24} median {statistics.median(values):8.3f}   {' '.join(f'{v:.3f}' for v in values)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="resnet")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp", "deepspeed"])
    parser.add_argument("--width", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--per-device", type=int, default=64)
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--skip", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    (compare_cpu_times if options.cpu else compare_wall_times)(options)


if __name__ == "__main__":
    main()
