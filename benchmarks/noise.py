"""Accuracy of the measured gradient noise scale on a problem where it is known, and the cost of measuring it.

python benchmarks/noise.py                 # real jobs on a quadratic with a known noise scale
python benchmarks/noise.py cost            # updates with and without measuring, alternating in one process per rank
python benchmarks/noise.py cost recipe=mlp batch.per_device=8 batch.accumulation=4 --workers 1
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.system.jsonl import JsonlReader
from launcher.system.run_files import METRICS_FILE

HERE = Path(__file__).resolve().parent
QUADRATIC = [
    *("recipe=own", "recipe._target_=quadratic.Quadratic", "recipe.trust=[quadratic]", "sink=[]", "lr.base=1e-12"),
    *("lr.base_batch=64", "batch.global=64", "train.duration=19200sp", "train.validate_every=null"),
    *("optimizer=sgd", "schedule=constant", "schedule.warmup=0sp", "checkpoint.every=null"),
]
LAYOUTS = {
    "1 worker, 2 micro-batches": ["launch.workers=1", "batch.per_device=32"],
    "1 worker, 5 micro-batches of 12 and 13": ["launch.workers=1", "batch.per_device=13"],
    "2 workers": ["launch.workers=2", "batch.per_device=32"],
    "3 workers, 22, 21 and 21 samples": ["launch.workers=3", "batch.per_device=22"],
    "2 workers, fsdp, 2 x 2 micro-batches": ["launch.workers=2", "batch.per_device=16", "strategy=fsdp"],
}


def compare_with_known(noises: list[float], seeds: int) -> None:
    """Print the estimate after 300 updates, and how often the interval of a row covers the true value."""
    for layout, overrides in LAYOUTS.items():
        for noise in noises:
            found = [run_job(noise, seed, overrides) for seed in range(seeds)]
            every = [get_interval(row) for rows in found for row in rows[20:]]
            covered = sum(low <= noise <= high for low, high in every) / len(every)
            ends = " ".join(format_estimate(rows[-1]) for rows in found)
            print(f"{layout:40} phi {noise:g}: {ends}; covered in {covered:.1%} of rows", flush=True)


def get_interval(row: dict[str, Any]) -> tuple[float, float]:
    return row.get("noise/scale_low", 0.0), row.get("noise/scale_high", math.inf)


def format_estimate(row: dict[str, Any]) -> str:
    low, high = get_interval(row)
    return f"{row.get('noise/scale', math.nan):.3g} ({low:.3g}-{high:.3g})"


def run_job(noise: float, seed: int, overrides: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "launcher", *QUADRATIC, *overrides, f"run.dir={folder}/run", f"seed={seed}"]
        argv += [f"+recipe.noise={noise}", f"+recipe.points_seed={seed}"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
        done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        return list(JsonlReader(Path(folder, "run", METRICS_FILE)))


# --- cost -----------------------------------------------------------------------------------------------------------


def measure_cost(overrides: list[str], workers: int, pairs: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, str(HERE / "noise.py"), "rank", f"--pairs={pairs}", *overrides], env=env, check=True)


def measure_cost_on_rank(overrides: list[str], pairs: int, warm_up: int = 10) -> None:
    """Run updates in pairs, one that measures and one that does not, in alternating order.

    Times are CPU times of the training thread, so other programs on the machine do not count.
    """
    import torch
    import torch.distributed as dist

    from launcher import recipe as recipes
    from launcher.config.compose import resolve
    from launcher.plan.training_plan import make_training_plan
    from launcher.topology import Topology
    from launcher.train.build import build_components, open_datasets

    config, topology = resolve(["sink=[]", *overrides]).config, Topology.from_env(os.environ)
    assert topology is not None
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    recipe = recipes.build_recipe(config.recipe)
    sizes = recipes.get_dataset_sizes(recipe)
    components = build_components(recipe, config, topology, torch.device("cpu"), open_datasets(recipe, config, sizes))
    plan = make_training_plan(config, sizes, topology.world).batch_plan
    run_update = make_updater(components, plan, topology.rank)
    times: dict[bool, list[float]] = {True: [], False: []}
    for index in range(2 * (pairs + warm_up)):
        measured = (index % 2 == 0) != (index // 2 % 2 == 0)
        with_s = run_update(measured)
        if index >= 2 * warm_up:
            times[measured].append(with_s)
    if topology.rank == 0:
        print_cost(times, plan.global_batch)
    dist.barrier()


def make_updater(parts: Any, plan: Any, rank: int) -> Callable[[bool], float]:
    """A function that runs one update on fixed samples and returns its CPU seconds."""
    import torch.distributed as dist
    from torch.utils.data import default_collate

    from launcher.strategies import ddp, gradient_norms

    sizes = plan.micro_batches(rank)
    batches = [default_collate([parts.train_data[index] for index in range(size)]) for size in sizes]
    replica, hooks, norms = parts.replica, parts.replica._norm_hooks, gradient_norms.compute_norms

    def run_update(measured: bool) -> float:
        ddp.compute_norms = norms if measured else lambda _: []  # type: ignore[attr-defined]
        replica._norm_hooks = hooks if measured else None
        if hooks is not None and not measured:
            hooks.enabled = False
        dist.barrier()
        start_s = time.thread_time()
        for index, batch in enumerate(batches):
            with replica.micro_batch(last=index == len(batches) - 1, is_padding=False, shard=rank):
                loss = replica.compute_loss(parts.recipe.loss, batch)
                replica.backward(loss.total, plan.global_batch, float(loss.count) if measured else 0.0)
        ddp.compute_norms = norms  # type: ignore[attr-defined]
        replica.step(1e-4, None, 1.0, None)
        return time.thread_time() - start_s

    return run_update


def print_cost(times: dict[bool, list[float]], batch: int) -> None:
    differences = [one - other for one, other in zip(times[True], times[False], strict=True)]
    from launcher.strategies.gradient_norms import MEASURE_EVERY

    without_ms, more_ms = statistics.median(times[False]) * 1e3, statistics.median(differences) * 1e3
    error_ms = 1.25 * statistics.stdev(differences) / len(differences) ** 0.5 * 1e3
    print(f"an update {without_ms:.2f} ms; measuring {more_ms:+.3f} +- {error_ms:.3f} ms in an update that measures")
    for name, every in (("in every update", 1), (f"in every {MEASURE_EVERY}th", MEASURE_EVERY)):
        host_ms = time_estimate(batch, every) * 1e3
        share = (more_ms / every + host_ms) / without_ms
        print(f"  {name}: with {host_ms:.3f} ms for the estimate {share:+.2%} of all updates")


def time_estimate(batch: int, every: int, updates: int = 2000) -> float:
    """Seconds per update for the estimate and its row values, with a full window, measuring one of `every` updates."""
    import random

    from launcher.goodput.noise_scale import NoiseScale

    noise, draw = NoiseScale(dataset_size=50_000), random.Random(0)
    start_s = 0.0
    for index in range(updates + 500):
        if index == 500:
            start_s = time.thread_time()
        shares = [] if index % every else [batch / 2] * 2
        noise = noise.update(shares, [2 + draw.random()] * len(shares), 1 + draw.random(), batch)
        noise.to_metrics(batch, batch)
    return (time.thread_time() - start_s) / updates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", default="known", choices=["known", "cost", "rank"])
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--noises", type=float, nargs="+", default=[10.0, 100.0])
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    options, more = parser.parse_known_args()
    overrides = [*options.overrides, *more]
    if options.what == "known":
        compare_with_known(options.noises, options.seeds)
    elif options.what == "cost":
        measure_cost(overrides, options.workers, options.pairs)
    else:
        measure_cost_on_rank(overrides, options.pairs)


if __name__ == "__main__":
    main()
