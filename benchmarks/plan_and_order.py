"""Cost of batch planning and of the sample order: medians over repeats, as a Markdown table.

    python benchmarks/plan_and_order.py [--repeats 9]

Targets: a plan for 10,000 workers in under 50 ms, an order of 10^12 samples in under 1 MB, at least 10^6 indices per
second in slices of 64 and of 4,096, at most 30 µs per update of 64 samples for its place in the timeline, asked for by
the loop and by the loader, and the order of its samples.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from datetime import date

from launcher.plan.batch import BatchPolicy, most_divisible_batch, plan_batch
from launcher.plan.sample_order import SamplePermutation
from launcher.plan.timeline import Position, Timeline
from launcher.train.data import MicroBatchSampler

WORLD = 10_000
SPEEDS = [1 + rank % 7 / 3 for rank in range(WORLD)]
HOLD = BatchPolicy("hold", per_device=48, global_batch=1_000_003)
SCALE = BatchPolicy("scale", per_device=64)
HUGE = 10**12
INDICES = 100_000
SLICES = (64, 4096)


def measure_median_s(call: Callable[..., object], repeats: int, arguments: Sequence[object] = ()) -> float:
    """Median CPU time of one call in seconds, after one warm-up call."""
    call(*arguments)
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call(*arguments)
        times.append(time.process_time() - begin)
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
        start = max(0, size - INDICES)
        for length in SLICES:
            seconds = measure_median_s(read_in_slices, repeats, (size, start, length))
            what = f"slices of {length:,} of an order of {size:,}"
            rows.append((what, f"{(size - start) / seconds:,.0f} indices/s"))
    order = SamplePermutation(HUGE, 0, 0)
    singly = measure_median_s(lambda: [order[place] for place in range(10_000)], repeats)
    rows.append((f"single indices of an order of {HUGE:,}", f"{10_000 / singly:,.0f} indices/s"))
    return [*rows, (f"peak memory of an order of {HUGE:,} with 1,000 indices", f"{measure_order_peak_bytes():,} bytes")]


def read_in_slices(size: int, start: int, length: int) -> None:
    order = SamplePermutation(size, 0, 0)
    for begin in range(start, size, length):
        order[begin : min(begin + length, size)]


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
    sampler = MicroBatchSampler(timeline, seed=0, rank=3, position=Position())
    sampled = measure_median_s(lambda: list(sampler), repeats)
    deep = Timeline(1437, 1437 * 100_000, ((0, plan),))
    count = measure_median_s(lambda: deep.count_updates(Position(5, 0)), repeats)
    return [
        ("one update of the timeline with one rank's micro-batches", f"{seconds / updates * 1e6:.1f} µs"),
        ("one update of the sampler of the data loader", f"{sampled / updates * 1e6:.1f} µs"),
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
