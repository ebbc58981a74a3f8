"""Cost of batch planning and of the sample order: medians over repeats, as a Markdown table.

    python benchmarks/plan_and_order.py [--repeats 9]

Targets: a plan for 10,000 workers in under 50 ms, an order of 10^12 samples in under 1 MB, at least 10^5 indices per
second in plain Python.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from datetime import date

from launcher.plan.batch import BatchPolicy, most_divisible_batch, plan_batch
from launcher.plan.sample_order import SamplePermutation
from launcher.plan.timeline import Position, Timeline

WORLD = 10_000
SPEEDS = [1 + rank % 7 / 3 for rank in range(WORLD)]
HOLD = BatchPolicy("hold", per_device=48, global_batch=1_000_003)
SCALE = BatchPolicy("scale", per_device=64)
HUGE = 10**12
INDICES = 100_000


def measure_median_s(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call in seconds, after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_planning(repeats: int) -> list[tuple[str, str]]:
    speeds, plan = "with speeds", plan_batch(HOLD, WORLD, SPEEDS)
    plans = {
        "scale": lambda: plan_batch(SCALE, WORLD),
        "hold": lambda: plan_batch(HOLD, WORLD),
        f"scale {speeds}": lambda: plan_batch(SCALE, WORLD, SPEEDS),
        f"hold {speeds}": lambda: plan_batch(HOLD, WORLD, SPEEDS),
        f"partial update of hold {speeds}": lambda: plan.truncated(777_777),
    }
    rows = [
        (f"plan of {WORLD:,} workers, {name}", format_ms(measure_median_s(call, repeats)))
        for name, call in plans.items()
    ]
    friendly = measure_median_s(lambda: most_divisible_batch([8, 12, 16, 17], 10_000, 32, 1500), repeats)
    return [*rows, ("most divisible batch up to 10,000 for 32 to 1,500 workers", format_ms(friendly))]


def measure_ordering(repeats: int) -> list[tuple[str, str]]:
    rows = []
    for size in (1437, 1_281_167, 10**9, HUGE):
        order = SamplePermutation(size, 0, 0)
        start = max(0, size - INDICES)
        seconds = measure_median_s(lambda order=order, start=start: order[start:], repeats)
        rows.append((f"slices of an order of {size:,}", f"{(size - start) / seconds:,.0f} indices/s"))
    order = SamplePermutation(HUGE, 0, 0)
    singly = measure_median_s(lambda: [order[place] for place in range(10_000)], repeats)
    rows.append((f"single indices of an order of {HUGE:,}", f"{10_000 / singly:,.0f} indices/s"))
    return [*rows, (f"peak memory of an order of {HUGE:,} with 1,000 indices", f"{measure_order_peak_bytes():,} bytes")]


def measure_order_peak_bytes() -> int:
    tracemalloc.start()
    SamplePermutation(HUGE, 1, 1)[HUGE // 2 : HUGE // 2 + 1000]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure_timeline(repeats: int) -> list[tuple[str, str]]:
    plan = plan_batch(BatchPolicy("hold", per_device=64, global_batch=256), 4)
    timeline = Timeline(1437, 1437 * 1000, ((0, plan),))
    updates = timeline.count_updates()
    seconds = measure_median_s(lambda: [update.micro_batches(3) for update in timeline.iter_updates()], repeats)
    deep = Timeline(1437, 1437 * 100_000, ((0, plan),))
    count = measure_median_s(lambda: deep.count_updates(Position(5, 0)), repeats)
    return [
        ("one update of the timeline with one rank's micro-batches", f"{seconds / updates * 1e6:.1f} µs"),
        ("counting the updates of 100,000 epochs", f"{count * 1e6:.1f} µs"),
    ]


def format_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"{date.today()}, Python {platform.python_version()}, {platform.machine()}, medians of {repeats}\n")
    print("| what | median |\n| --- | --- |")
    for what, value in [*measure_planning(repeats), *measure_ordering(repeats), *measure_timeline(repeats)]:
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
