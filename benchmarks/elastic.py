"""Recovery time of a job, and the cost of elasticity in normal operation.

    python benchmarks/elastic.py            # everything: about 15 minutes
    python benchmarks/elastic.py recovery   # one part: recovery, joins, stop, survivors, save

recovery: kill -9 of a random worker, repeatedly, for the launcher and for a plain torchrun script; measures from the
kill to the end of the first update after the restart. The plain script restores nothing.
joins: a third torchrun agent joins two, is killed and joins again; the cost of growing and of losing a node.
stop: graceful stops of a job, each followed by a resume; checks that no update is lost or run twice.
survivors: kill -9 of the agent; the time until the last process of the job has ended.
save: the time a checkpoint blocks the training loop, compared with the time to write it.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.run_dir.restart_cost import read_last_row
from launcher.system.jsonl import JsonlReader
from launcher.system.processes import list_child_pids
from launcher.system.run_files import EVENTS_FILE, METRICS_FILE

HERE = Path(__file__).parent
KILLS, JOINS, STOPS = 20, 20, 15
ENV = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
LONG = ["recipe=resnet", "launch.workers=2", "sink=[]", "train.duration=100000ep", "train.validate_every=null"]


def start_launcher(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    argv = [sys.executable, "-m", "launcher", *LONG, *overrides]
    return subprocess.Popen(argv, cwd=folder, env=ENV, stdout=quiet, stderr=quiet)


def read_rows(run_dir: Path) -> list[dict[str, float]]:
    metrics = run_dir / METRICS_FILE
    return list(JsonlReader(metrics))


def wait_for(state: Callable[[], object], within_s: float = 240.0, every_s: float = 0.05) -> None:
    """Poll cheaply: two workers import torch on two cores in the meantime."""
    end_s = time.monotonic() + within_s
    while not state():
        if time.monotonic() > end_s:
            raise TimeoutError(f"the awaited state was not reached within {within_s:g} s")
        time.sleep(every_s)


def list_workers(driver: int) -> list[int]:
    return [worker for agent in list_child_pids(driver) for worker in list_child_pids(agent)]


def read_last(run_dir: Path) -> dict[str, Any]:
    return read_last_row(run_dir / METRICS_FILE) or {"generation": 0, "update": 0}


def wait_until_trained(run_dir: Path, generation: int) -> int:
    """Wait until this generation of workers has trained; return its current update."""
    wait_for(lambda: read_last(run_dir)["generation"] == generation)
    return int(read_last(run_dir)["update"])


def measure_recoveries(folder: Path) -> list[float]:
    run_dir = folder / "runs/r"
    process = start_launcher(folder, "run.name=r", "checkpoint.every=20ba", "elastic.max_restarts=100")
    found: list[float] = []
    for generation in range(1, KILLS + 1):
        begun = wait_until_trained(run_dir, generation)
        wait_for(lambda begun=begun: read_last(run_dir)["update"] >= begun + 30)
        killed_at = time.time()
        os.kill(random.choice(list_workers(process.pid)), signal.SIGKILL)
        wait_until_trained(run_dir, generation + 1)
        found.append(next(row["time"] for row in read_rows(run_dir) if row["generation"] == generation + 1) - killed_at)
    process.kill()
    process.wait()
    return found


def measure_plain_recoveries(folder: Path) -> list[float]:
    starts = folder / "starts"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = [*torchrun, "--max-restarts=1000", "--monitor-interval=0.1", str(HERE / "plain_ddp.py")]
    env = ENV | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [*argv, "--updates=1000000", f"--starts={starts}"], cwd=folder, env=env, stdout=quiet, stderr=quiet
    )
    found: list[float] = []
    for number in range(1, KILLS + 1):
        wait_for(lambda number=number: starts.exists() and len(starts.read_text().split()) >= number)
        time.sleep(1.0)
        killed_at = time.time()
        os.kill(random.choice(list_child_pids(process.pid)), signal.SIGKILL)
        wait_for(lambda number=number: len(starts.read_text().split()) > number)
        found.append(float(starts.read_text().split()[number]) - killed_at)
    workers = list_child_pids(process.pid)
    process.kill()
    process.wait()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    return found


def measure_recovery(folder: Path) -> None:
    own, plain = measure_recoveries(folder), measure_plain_recoveries(folder)
    for name, values in (("launcher", own), ("plain script", plain)):
        high = sorted(values)[int(0.95 * len(values)) - 1]
        median = statistics.median(values)
        print(f"recovery, {name:14} {len(values)} of {KILLS}   median {median:.2f} s   95% {high:.2f} s")


def start_agent(folder: Path, port: int, *, first: bool) -> subprocess.Popen[bytes]:
    """Start the torchrun agent of one node, in a job of one to three nodes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1"]
    where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--max-restarts=1000"]
    conf = f"--rdzv-conf=is_host={int(first)},last_call_timeout=2,keep_alive_interval=1"
    job = [word for word in LONG if not word.startswith("launch.")] + ["batch=hold", "batch.global=48", "run.name=j"]
    argv = [*torchrun, *where, conf, "--local-addr=127.0.0.1", "--monitor-interval=0.2", "-m", "launcher", *job]
    env = ENV | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*argv, "checkpoint.every=100ba"], cwd=folder, env=env, stdout=quiet, stderr=quiet)


def wait_for_resize(run_dir: Path, world: int, after: int) -> tuple[int, float, int]:
    """Wait for a generation later than `after` at this world size.

    Returns its generation, the seconds from the last update before it to its first, and the samples trained on again.
    """

    def there() -> bool:
        row = read_last_row(run_dir / METRICS_FILE)
        return row is not None and row["world"] == world and row["generation"] > after

    wait_for(there)
    found = read_rows(run_dir)
    index = next(n for n, row in enumerate(found) if row["generation"] > after and row["world"] == world)
    row, before = found[index], found[max(index - 1, 0)]
    return int(row["generation"]), row["time"] - before["time"], int(row.get("elastic/lost_samples", 0))


def measure_joins(folder: Path) -> None:
    run_dir, port = folder / "runs/j", random.randint(20_000, 40_000)
    agents = [start_agent(folder, port, first=True), start_agent(folder, port, first=False)]
    costs: dict[str, list[tuple[float, int]]] = {"joins": [], "losses of a node": []}
    try:
        generation, *_ = wait_for_resize(run_dir, 2, 0)
        for _ in range(JOINS):
            third = start_agent(folder, port, first=False)
            agents.append(third)
            generation, *grown = wait_for_resize(run_dir, 3, generation)
            costs["joins"].append((grown[0], int(grown[1])))
            third.kill()
            third.wait()
            generation, *shrunk = wait_for_resize(run_dir, 2, generation)
            costs["losses of a node"].append((shrunk[0], int(shrunk[1])))
            print(
                f"  join {grown[0]:.1f} s, {grown[1]} samples; loss {shrunk[0]:.1f} s, {shrunk[1]} samples", flush=True
            )
    except TimeoutError as problem:
        print(f"{problem}\n{(run_dir / EVENTS_FILE).read_text()[-3000:]}")
    finally:
        for one in reversed(agents):
            one.kill()
            one.wait()
    for name, found in costs.items():
        stood, lost = sorted(seconds for seconds, _ in found), sorted(samples for _, samples in found)
        print(
            f"{name:23} {len(found)} of {JOINS}   samples repeated: {statistics.median(lost):.0f}, most {lost[-1]}",
            end="",
        )
        print(f"   no training for {statistics.median(stood):.1f} s (median), {stood[-1]:.1f} s at most")


def measure_stops(folder: Path) -> None:
    run_dir = folder / "runs/s"
    for number in range(STOPS):
        before = len(read_rows(run_dir))
        process = start_launcher(folder, "run.name=s")
        wait_for(lambda before=before: len(read_rows(run_dir)) >= before + random.randint(3, 12))
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
        assert status == 0, f"stop {number + 1} ended with {status}"
    updates = [row["update"] for row in read_rows(run_dir)]
    whole = updates == list(range(1, len(updates) + 1))
    found = "each once" if whole else "NOT each once"
    print(f"graceful stops          {STOPS} of {STOPS}   {len(updates)} updates, {found}")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def measure_survivors(folder: Path) -> None:
    process = start_launcher(folder, "run.name=k")
    wait_for(lambda: len(read_rows(folder / "runs/k")) >= 5)
    workers, (agent,) = list_workers(process.pid), list_child_pids(process.pid)
    start_s = time.monotonic()
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not any(is_running(pid) for pid in (*workers, agent)), every_s=0.01)
    print(f"agent killed            no process left after {time.monotonic() - start_s:.2f} s")
    process.wait()


def measure_save(folder: Path) -> None:
    """Save a model of 25 million parameters with Adam's moments: 300 MB per checkpoint."""
    overrides = ["recipe=mlp", "recipe.hidden=3500", "recipe.depth=3", "optimizer=adamw", "lr.base=0.0001"]
    sizes = ["batch.per_device=16", "lr.base_batch=32", "train.duration=42ba", "checkpoint.every=10ba"]
    start_launcher(folder, *overrides, *sizes, "run.name=c").wait()
    events = list(JsonlReader(folder / "runs/c" / EVENTS_FILE))
    saved = [event for event in events if event["event"] == "checkpoint"][1:]  # the first one allocates the buffers
    stalls = [
        row["stage/checkpoint/ms"] / 1e3 for row in read_rows(folder / "runs/c") if row["stage/checkpoint/ms"] > 1
    ][1:]
    stall_s, write_s = statistics.median(stalls), statistics.median(event["seconds"] for event in saved)
    size_mb = saved[0]["bytes"] / 1e6
    print(
        f"save of {size_mb:.0f} MB          training waits {stall_s * 1e3:.0f} ms, writing takes {write_s * 1e3:.0f} ms"
    )
    print(f"                        stall / synchronous = {stall_s / (stall_s + write_s):.3f}")


PARTS = {
    "recovery": measure_recovery,
    "joins": measure_joins,
    "stop": measure_stops,
    "survivors": measure_survivors,
    "save": measure_save,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        with tempfile.TemporaryDirectory() as name:
            PARTS[part](Path(name))
