"""Compare the recommendation of `tune` with measuring every size, which costs more; and its repeatability.

    python benchmarks/tune.py                       # three recipes: the search compared with every size
    python benchmarks/tune.py --repeats 10          # ten searches of one recipe instead

Every size of a fine grid is measured several times by `tune.sizes`; the knee is the smallest size with 90 % of the best
samples/s. The search then gets a fifth of the seconds that this took. Its recommendation is compared with the grid's
knee in a third measurement of these two sizes only, alternating, because neighbours in the grid differ by up to 7 %.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

#: Recipes and their grids; all with two workers of one thread each.
RECIPES: Mapping[str, tuple[Sequence[str], Sequence[int]]] = {
    "mlp": (["recipe=mlp"], range(8, 521, 16)),
    "resnet": (["recipe=resnet"], range(4, 165, 5)),
    "gpt": (["recipe=gpt", "recipe.width=64", "recipe.layers=2", "recipe.block=64"], range(2, 99, 3)),
}
SHARE = 0.2
KNEE = 0.9
AGAIN_S = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--budget", type=float, default=150.0, help="seconds for the grid, or for each repeat")
    options = parser.parse_args()
    for name in options.recipes:
        (repeat_search if options.repeats else compare_with_grid)(name, options)


def compare_with_grid(name: str, options: argparse.Namespace) -> None:
    overrides, grid = RECIPES[name]
    whole = run_tune(overrides, f"tune.sizes={list(grid)}", f"tune.budget_s={options.budget}")
    speeds = {point["per_device"]: point["samples_per_s"] for point in whole["points"] if point["samples_per_s"]}
    knee = min(size for size, speed in speeds.items() if speed >= KNEE * max(speeds.values()))
    found = run_tune(overrides, f"tune.max={max(grid)}", f"tune.budget_s={SHARE * whole['spent_s']:.0f}")
    size = found["recommended"]
    pair = run_tune(overrides, f"tune.sizes=[{knee},{size}]", f"tune.budget_s={AGAIN_S}") if size != knee else whole
    both = {point["per_device"]: point["samples_per_s"] for point in pair["points"]}
    print(f"{name}: grid of {len(speeds)} sizes, {whole['spent_s']:.0f} s, best {max(speeds.values()):.0f} samples/s")
    print(f"  its knee          {knee:4}: {both[knee]:8.0f} samples/s (in the grid {speeds[knee]:.0f})")
    took = f"{found['spent_s']:.0f} s, {found['spent_s'] / whole['spent_s']:.2f} of the grid's"
    print(f"  the search's size {size:4}: {both[size]:8.0f}, {both[size] / both[knee]:.3f} of it; {took}")


def repeat_search(name: str, options: argparse.Namespace) -> None:
    """Repeat the search; a neighbour is a factor of sqrt(2) away, the growth factor of the search."""
    overrides, grid = RECIPES[name]
    budget = min(options.budget, 30.0)
    found = [run_tune(overrides, f"tune.max={max(grid)}", f"tune.budget_s={budget}") for _ in range(options.repeats)]
    sizes = sorted(one["recommended"] for one in found)
    middle = sizes[len(sizes) // 2]
    steps = [abs(math.log(size / middle)) / math.log(math.sqrt(2)) for size in sizes]
    print(f"{name:8} {budget:.0f} s each: {sizes}, at most {max(steps):.2f} neighbours from {middle}", flush=True)


def run_tune(overrides: Sequence[str], *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "launcher", "tune", "format=json", *overrides, *more]
    command += ["launch.workers=2", "launch.threads=1", "train.validate_every=null"]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()
