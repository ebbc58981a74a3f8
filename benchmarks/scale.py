"""What a job costs as a function of its number of workers: counted at 2 to 64 processes, calculated for up to 10,000.

    python benchmarks/scale.py                    # everything, about four minutes
    python benchmarks/scale.py exchange rank0     # parts: exchange, rank0, plan, start, checkpoint
    python benchmarks/scale.py exchange --worlds 2 8

Prints Markdown tables. The processes are forked from this one, so that 64 of them start within seconds, and share the
cores: messages, bytes and CPU time are counted, wall time would mean nothing. Messages and bytes are those that the
kernel has counted on the sockets of each process (TCP_INFO): a message is a TCP segment with data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.sharded import ShardInfo, format_shard_index_name, merge_all_shards
from launcher.distributed.consistency_check import find_first_mismatch, prepare_and_compare
from launcher.distributed.load_balancing import LoadBalancer
from launcher.distributed.rank_stats import GatheredStats
from launcher.distributed.rendezvous import answer_hellos, broadcast_text, gather_to_rank0, make_loopback_store
from launcher.distributed.store_gather import StoreGather
from launcher.distributed.stragglers import StragglerDetector
from launcher.plan.batch import BatchPlan, BatchPolicy, plan_batch
from launcher.plan.timeline import Timeline
from launcher.telemetry.stage_metrics import compute_stage_metrics
from launcher.telemetry.stages import STAGES
from launcher.telemetry.stats_fields import NUM_STATS
from launcher.topology import Topology

WORLDS = (2, 4, 8, 16, 32, 64)
NICENESS = 15  # 64 processes on few cores must not delay what else runs there
SIZES = (10, 100, 1000, 10_000)
WORDS = 2 * NUM_STATS  # float32 words of each rank in every update: two for each number
GATHERED_WORDS = 18  # float64 words of each rank in the all-gather that preceded it
TCP_INFO_BYTES, BYTES_ACKED, DATA_SEGMENTS_OUT = 232, slice(120, 128), slice(156, 160)
TIMEOUT_S = 300.0


# --- processes and counters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a process has sent and computed."""

    messages: float
    sent_bytes: float
    cpu_s: float

    @classmethod
    def of_this_process(cls) -> Cost:
        infos = list(read_tcp_infos())
        return cls(
            messages=sum(int.from_bytes(info[DATA_SEGMENTS_OUT], sys.byteorder) for info in infos),
            sent_bytes=sum(int.from_bytes(info[BYTES_ACKED], sys.byteorder) for info in infos),
            cpu_s=time.process_time(),
        )

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(self.messages - earlier.messages, self.sent_bytes - earlier.sent_bytes, self.cpu_s - earlier.cpu_s)

    def __truediv__(self, count: float) -> Cost:
        return Cost(self.messages / count, self.sent_bytes / count, self.cpu_s / count)


def read_tcp_infos() -> Iterator[bytes]:
    """What the kernel knows of each TCP connection of this process."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                yield copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except OSError:  # closed in the meantime, or no TCP connection
            continue


def run_forked(world: int, rank_function: Callable[[int], Any]) -> list[Any]:
    """Run a function in a forked process per rank; return the results, which must be JSON values, in rank order."""
    pipes = [os.pipe() for _ in range(world)]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for reading, _ in pipes:
                    os.close(reading)
                result = rank_function(rank)
                with os.fdopen(pipes[rank][1], "w") as file:
                    json.dump(result, file)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    for _, writing in pipes:
        os.close(writing)
    texts = []
    for reading, _ in pipes:
        with os.fdopen(reading) as file:
            texts.append(file.read())
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(statuses):
        sys.exit("a process has failed")
    return [json.loads(text) for text in texts]


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def connect(rank: int, world: int, port: int) -> dist.Store:
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return make_loopback_store(port, serve=rank == 0, world=world, timeout_s=TIMEOUT_S)
        except (RuntimeError, OSError):  # rank 0 does not listen yet
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


@contextmanager
def process_group(rank: int, world: int, port: int) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=connect(rank, world, port), rank=rank, world_size=world)
    yield
    dist.barrier()
    dist.destroy_process_group()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(f"\n**{title}**\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def measure_cpu_ms(call: Callable[[], object], repeats: int = 7) -> float:
    """Median CPU time of one call, after one warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times) * 1e3


# --- the exchange of statistics in every update -------------------------------------------------------------------


class ModelWithRows(nn.Module):
    """1.1 million parameters; with `rows`, an extra parameter whose gradient is the ranks' statistics."""

    def __init__(self, world: int, *, rows: bool) -> None:
        super().__init__()
        layers = [
            nn.Linear(256, 700),
            nn.ReLU(),
            nn.Linear(700, 700),
            nn.ReLU(),
            nn.Linear(700, 600),
            nn.Linear(600, 10),
        ]
        self.layers = nn.Sequential(*layers)
        self.rows = nn.Parameter(torch.zeros(world, WORDS)) if rows else None

    def forward(self, batch: torch.Tensor, own_row: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layers(batch).square().sum()
        return loss if self.rows is None else loss + (self.rows * own_row).sum()


FORMS = {
    "gradients alone": "none",
    "rows in the first bucket": "rows",
    "rows in an all-reduce of their own": "reduce",
    "all-gather on a group of its own": "gather",
}


def measure_form(form: str, rank: int, world: int, updates: int) -> Cost:
    """The cost of one update on this rank."""
    torch.manual_seed(0)
    group = dist.new_group(backend="gloo") if form == "gather" else None
    model = DistributedDataParallel(ModelWithRows(world, rows=form == "rows"), gradient_as_bucket_view=True)
    batch, own_row = torch.randn(2, 256), torch.zeros(world, WORDS)
    own_row[rank] = 1.0
    gathered = torch.zeros(world * GATHERED_WORDS, dtype=torch.float64)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def update() -> None:
        loss, work = model(batch, own_row), None
        if form == "gather":
            own = torch.ones(GATHERED_WORDS, dtype=torch.float64)
            work = all_gather(gathered, own, group=group, async_op=True)
        loss.backward()
        if form == "reduce":
            work = dist.all_reduce(own_row.clone(), async_op=True)
        if work is not None:
            work.wait()
        model.zero_grad(set_to_none=True)

    update()
    time.sleep(0.1)  # the last bytes have been acknowledged
    before = Cost.of_this_process()
    for _ in range(updates):
        update()
    spent = Cost.of_this_process().cpu_s - before.cpu_s
    time.sleep(0.1)
    after = Cost.of_this_process()
    dist.barrier()
    return Cost(after.messages, after.sent_bytes, before.cpu_s + spent) - before


def show_exchange(worlds: Sequence[int]) -> None:
    rows = []
    for world in worlds:
        updates, port = max(2, 32 // world), find_free_port()

        def run(rank: int, world: int = world, updates: int = updates, port: int = port) -> dict[str, Any]:
            with process_group(rank, world, port):
                return {name: vars(measure_form(form, rank, world, updates) / updates) for name, form in FORMS.items()}

        ranks = run_forked(world, run)
        for name in FORMS:
            costs = [Cost(**each[name]) for each in ranks]
            messages, sent, cpu = (
                statistics.fmean(values)
                for values in (
                    [cost.messages for cost in costs],
                    [cost.sent_bytes for cost in costs],
                    [cost.cpu_s for cost in costs],
                )
            )
            rows.append((world, name, f"{messages:,.1f}", f"{sent:,.0f}", f"{cpu * 1e3:.2f}"))
    columns = ("workers", "form", "messages per rank", "bytes sent per rank", "CPU ms per rank")
    print_table("One update of 1.1 million parameters under DDP on gloo, counted", columns, rows)
    print_exchange_arithmetic()


def print_exchange_arithmetic() -> None:
    rows = []
    for world in (64, 1000, 10_000):
        size = 4 * WORDS * world
        steps = 2 * (world - 1)
        gathered = 8 * GATHERED_WORDS * (world - 1)
        rows.append((f"{world:,}", f"{size:,}", f"{2 * size * (world - 1) / world:,.0f}", 0, steps, f"{gathered:,}"))
    columns = (
        "workers",
        "bytes of the rows",
        "sent per rank, ring",
        "steps more, in the bucket",
        "steps, ring of their own",
        "sent per rank by the former all-gather",
    )
    print_table("The exchange by arithmetic", columns, rows)


# --- what rank 0 does with the rows -------------------------------------------------------------------------------


def show_rank0(_: Sequence[int]) -> None:
    rows = []
    for world in SIZES:
        times = torch.rand(world, len(STAGES)) * 10 + 10
        table = torch.rand(world, NUM_STATS, dtype=torch.float64).round()
        metrics_ms = measure_cpu_ms(lambda times=times: compute_stage_metrics(times, 64))
        sums_ms = measure_cpu_ms(lambda table=table: read_table(table))
        stragglers_ms, balance_ms = measure_stragglers_ms(times), measure_balance_ms(times)
        total_ms = sums_ms + metrics_ms + stragglers_ms
        cells = (f"{value:.2f}" for value in (sums_ms, balance_ms, metrics_ms, stragglers_ms, total_ms))
        rows.append((f"{world:,}", *cells))
    columns = (
        "workers",
        "every rank: reads the table",
        "every rank with elastic.balance",
        "rank 0: stage metrics",
        "rank 0: stragglers",
        "rank 0, all but balance",
    )
    print_table("CPU ms per update for the statistics of all ranks", columns, rows)


def read_table(table: torch.Tensor) -> tuple[Any, ...]:
    """What the training loop asks of the table in every update."""
    gathered = GatheredStats(table[:, None])
    return gathered.count, gathered.stop, gathered.save, gathered.loss, gathered.loss_count, gathered.finite


def measure_stragglers_ms(times: torch.Tensor, updates: int = 60) -> float:
    detector, shares = StragglerDetector(), (64,) * len(times)
    begin = time.process_time()
    for _ in range(updates):
        detector, _found = detector.with_update(times, shares)
    return (time.process_time() - begin) / updates * 1e3


def measure_balance_ms(times: torch.Tensor, updates: int = 60) -> float:
    policy = BatchPolicy("hold", 64, global_batch=64 * len(times))
    plan = plan_batch(policy, len(times))
    update = next(iter(Timeline(10**9, 10**9, ((0, plan),)).iter_updates()))
    balancer = LoadBalancer(plan, lambda speeds: plan_batch(policy, len(times), speeds))
    begin = time.process_time()
    for _ in range(updates):
        balancer.on_gathered(times, update)
    return (time.process_time() - begin) / updates * 1e3


# --- the plan -----------------------------------------------------------------------------------------------------


def show_plan(_: Sequence[int]) -> None:
    rows = []
    for world in SIZES:
        policy = BatchPolicy("hold", 48, global_batch=64 * world + 1)
        speeds = [1 + rank % 7 / 3 for rank in range(world)]
        plan = plan_batch(policy, world, speeds)
        cells = (
            measure_cpu_ms(lambda policy=policy, world=world: plan_batch(policy, world)),
            measure_cpu_ms(lambda policy=policy, world=world, speeds=speeds: plan_batch(policy, world, speeds)),
            measure_cpu_ms(lambda plan=plan, world=world: plan.truncated(40 * world)),
        )
        per_update = (measure_update_us(plan, even=even) for even in (False, True))
        rows.append(
            (
                f"{world:,}",
                *(f"{value:.2f} ms" for value in cells),
                *(f"{value:.1f} µs" for value in per_update),
                f"{measure_plan_bytes(policy, world, speeds):,}",
            )
        )
    columns = ("workers", "plan", "with speeds", "tail, once", "update, one rank", "with padding", "bytes of the plan")
    print_table("The batch plan, CPU time", columns, rows)


def measure_update_us(plan: BatchPlan, *, even: bool, updates: int = 1000) -> float:
    """CPU time of an update of the timeline with one rank's micro-batches; every third one ends an epoch."""
    timeline = Timeline(plan.global_batch * 5 // 2, 10**12, ((0, plan),), even=even)
    begin = 0.0
    for update in timeline.iter_updates():
        if update.index == 10:  # the plan of the short update has been made
            begin = time.process_time()
        if update.index == 10 + updates:
            break
        update.micro_batches(plan.world - 1)
    return (time.process_time() - begin) / updates * 1e6


def measure_plan_bytes(policy: BatchPolicy, world: int, speeds: Sequence[float]) -> int:
    tracemalloc.start()
    plan = plan_batch(policy, world, speeds)
    _ = plan.share_starts, plan.most_micro_batches
    size, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


# --- the start of a job -------------------------------------------------------------------------------------------

FACTS = {
    "the launcher's version": "1.0.0",
    "torch's version": torch.__version__,
    "python's version": platform.python_version(),
    "the training data's length": 1_281_167,
    "the validation data's length": 50_000,
    "the generation in the run directory": 3,
    "the newest checkpoint": "update-00012345",
}
JOB = "x" * 6000  # about the size of a job with its resolved configuration


def show_start(worlds: Sequence[int]) -> None:
    rows = []
    for world in worlds:
        port = find_free_port()
        ranks = run_forked(world, lambda rank, world=world, port=port: start_rank(rank, world, port))
        for step in ranks[0]:
            rank0, *others = (Cost(**each[step]) for each in ranks)
            rows.append(
                (
                    world,
                    step,
                    f"{rank0.messages:,.0f}",
                    f"{rank0.sent_bytes:,.0f}",
                    f"{statistics.fmean(cost.messages for cost in others):,.1f}",
                    f"{statistics.fmean(cost.sent_bytes for cost in others):,.0f}",
                )
            )
    columns = ("workers", "step", "rank 0: messages", "bytes sent", "other ranks: messages", "bytes sent")
    print_table("The start of a job, counted (rank 0 serves the store)", columns, rows)
    show_store_server()


def start_rank(rank: int, world: int, port: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    store, topology = connect(rank, world, port), Topology(rank=rank, world=world)
    steps: dict[str, Any] = {}

    def count(step: str, call: Callable[[], Any]) -> Any:
        before = Cost.of_this_process()
        result = call()
        time.sleep(0.2)  # the other ranks have also read what this one has written
        steps[step] = vars(Cost.of_this_process() - before)
        return result

    _, section = count("first messages", lambda: gather_to_rank0(store, topology, "", TIMEOUT_S))
    count("the job, sent by rank 0", lambda: broadcast_text(section, None if rank else JOB))
    count("comparison of the setups", lambda: prepare_and_compare(section, topology, lambda: None, lambda _: FACTS))
    gather = StoreGather(section, rank, world)
    count("one gather through the store", lambda: gather.gather(rank))

    def form_group() -> None:
        dist.init_process_group("gloo", store=section, rank=rank, world_size=world)
        dist.barrier()

    count("process group (gloo)", form_group)
    dist.destroy_process_group()
    gather.close()
    return steps


def show_store_server() -> None:
    """Rank 0's own work for many ranks, with one client in their place."""
    rows = []
    for world in SIZES:
        store = make_loopback_store(0, serve=True, world=world, timeout_s=TIMEOUT_S)
        ranks = range(1, world)
        begin = time.process_time()
        for rank in ranks:
            store.set(f"hello/{rank}", f"{rank:016x}")
        request_us = (time.process_time() - begin) / len(ranks) * 1e6
        store.multi_set([f"token/{rank}" for rank in ranks], [""] * len(ranks))
        begin = time.process_time()
        answer_hellos(store, world, "token", TIMEOUT_S)
        answers_ms = (time.process_time() - begin) * 1e3
        reports = [json.dumps({"facts": FACTS})] * world
        compare_ms = measure_cpu_ms(lambda reports=reports: find_first_mismatch([json.loads(r) for r in reports]), 3)
        rows.append((f"{world:,}", f"{request_us:.0f} µs", f"{answers_ms:.1f} ms", f"{compare_ms:.1f} ms"))
    columns = ("workers", "one request, client and server", "answering all hellos", "comparing all setups")
    print_table("Rank 0 at the start, CPU time", columns, rows)


# --- sharded checkpoints ------------------------------------------------------------------------------------------

CASES = ((8, 300), (64, 300), (512, 300), (64, 2400))


def show_checkpoint(_: Sequence[int]) -> None:
    rows = []
    for world, tensors in CASES:
        with tempfile.TemporaryDirectory() as name:
            notes = write_notes(Path(name), world, tensors)
            rank0 = {"files": {}, "tensors": {}}
            shard = ShardInfo(0, world + 1, "1", {}, lambda: None)
            begin = time.process_time()
            files, index = merge_all_shards(Path(name), rank0["files"], rank0["tensors"], shard)
            merge_s = time.process_time() - begin
        manifest = Manifest(files, index, {"samples": 1, "update": 1}, {}, world, {})
        begin = time.process_time()
        text = manifest.to_json()
        write_s = time.process_time() - begin
        begin = time.process_time()
        Manifest.from_json(text)
        read_s = time.process_time() - begin
        pieces = world * tensors
        cells = (f"{value:.2f} s" for value in (merge_s, write_s, read_s))
        rows.append((world, tensors, f"{notes / world:,.0f}", f"{len(text):,}", f"{len(text) / pieces:.0f}", *cells))
    columns = (
        "workers",
        "tensors",
        "bytes of a rank's note",
        "bytes of the manifest",
        "per piece",
        "rank 0 merges the notes",
        "writes the manifest",
        "each rank reads it",
    )
    print_table("Sharded checkpoints, CPU time", columns, rows)


def write_notes(folder: Path, world: int, tensors: int) -> int:
    """Write the notes of ranks 1 to `world` about equal slices of all tensors; return their size in bytes."""
    size, total = 4096, 0
    for rank in range(world):
        file = f"model-{rank + 2:05}-of-{world + 1:05}.safetensors"
        facts: Mapping[str, Any] = {
            "files": {file: {"size": size * tensors * 4, "sha256": f"{random.getrandbits(256):064x}"}},
            "tensors": {
                f"blocks.{number}.attention.weight": {
                    "dtype": "float32",
                    "shape": [world * size],
                    "pieces": [[file, f"blocks.{number}.attention.weight", rank * size, (rank + 1) * size]],
                    "aliases": [],
                }
                for number in range(tensors)
            },
        }
        total += (folder / format_shard_index_name(rank + 1)).write_text(json.dumps(facts))
    return total


PARTS: Mapping[str, Callable[[Sequence[int]], None]] = {
    "exchange": show_exchange,
    "rank0": show_rank0,
    "plan": show_plan,
    "start": show_start,
    "checkpoint": show_checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--worlds", nargs="+", type=int, default=WORLDS)
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.nice(NICENESS)
    torch.set_num_threads(1)
    print(f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    for name in options.parts or PARTS:
        PARTS[name](options.worlds)


if __name__ == "__main__":
    main()
