"""The cost of the launcher: time, CPU time, memory and start beside a plain DDP script and Hugging Face accelerate.

    python benchmarks/overhead.py                   # three sizes, accumulation 1 and 4, ten pairs of each
    python benchmarks/overhead.py --quick           # the two small sizes, six short pairs
    python benchmarks/overhead.py --seconds 1000    # 1,000 updates of every size, which takes hours
    python benchmarks/overhead.py --recipe gpt --set width=128 --per-device 16 --strategy fsdp

Prints Markdown for overhead.md, or says that the machine was too busy and prints no numbers. The launcher does all that
it does by default, with wandb offline; only validation and checkpoints before the end are off, as the others have none.
All programs train the same model on the same data and are measured by the same ruler, in `overhead_workload.py`. A pair
is one run of each program, in rotated order; ratios are taken within a pair. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from overhead_workload import CLASSES_BY_NAME, FOLDER_VARIABLE, MARKS_VARIABLE
from paired_runs import MachineBusyError, Measurement, Pair, Pairs, collect_pairs, make_table, rotate
from quiet_machine import Calibration, CpuClock, CpuUse, Limits, calibrate, find_disturbances

HERE = Path(__file__).resolve().parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PROGRAMS = ("plain", "launcher", "accelerate")
#: Fields of the recipe and samples per worker, for updates of about these times with two workers on two cores.
SIZES = {"4 ms": ("width=160", 64), "12 ms": ("width=640", 64), "60 ms": ("width=1280", 128)}
LEFT_OVER_S = 20.0  # how long a job may take to end after its command has
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Case:
    """What every program trains."""

    size: str
    fields: tuple[str, ...]
    per_device: int
    accumulation: int

    @property
    def name(self) -> str:
        return f"{self.size}, accumulation {self.accumulation}"


@dataclass(frozen=True)
class Lengths:
    """Updates before the measured ones, by program, and the measured ones."""

    warmup: dict[str, int]
    measured: int

    @classmethod
    def choose(cls, update_s: float, options: argparse.Namespace) -> Lengths:
        """The launcher's warm-up is longer: it starts wandb in its first seconds."""
        measured = min(options.updates, max(20, math.ceil(options.seconds / update_s)))
        seconds = dict.fromkeys(PROGRAMS, 1.0) | {"launcher": options.settle}
        return cls({name: max(10, math.ceil(value / update_s)) for name, value in seconds.items()}, measured)


def main() -> None:
    options = parse_options()
    cases = {case.name: case for case in make_cases(options)}
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a job leaves behind is waited for here
    options.out.parent.mkdir(parents=True, exist_ok=True)
    begun_s, load, pairs, lengths = time.monotonic(), os.getloadavg()[0], Pairs(Limits()), {}

    def run_pair(name: str, number: int) -> Pair:
        wait_until_quiet(pairs, options.patience)
        if name not in lengths:
            lengths[name] = Lengths.choose(probe_update_s(cases[name], options), options)
        pair = measure_pair(cases[name], lengths[name], rotate(options.programs, number), options)
        with options.out.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(pair)) + "\n")
        print(f"{name}, pair {number + 1}: {describe_pair(pair)}", file=sys.stderr, flush=True)
        return pair

    try:
        wait_until_quiet(pairs, options.patience, load_too=True)
        collect_pairs(list(cases), options.pairs, options.attempts, run_pair, pairs)
    except MachineBusyError as error:
        kept = f" The runs so far are in {options.out}." if options.out.exists() else ""
        sys.exit(f"The machine was too busy, so there is no result. {error}.{kept}")
    minutes = (time.monotonic() - begun_s) / 60
    print("\n".join(describe_conditions(pairs, load, minutes, options)), end="\n\n")
    print("\n".join(make_table(pairs, {name: describe_case(case) for name, case in cases.items()}, options.programs)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--pairs", type=int, default=10, help="pairs per case that must be measured on a quiet machine")
    parser.add_argument("--attempts", type=int, help="pairs per case after which to give up; default: twice --pairs")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--updates", type=int, default=1000, help="measured updates per run")
    parser.add_argument("--seconds", type=float, default=4.0, help="fewer updates if they take longer than this")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds of the launcher's training not measured")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp", "deepspeed"])
    parser.add_argument("--recipe", default="perceptron", choices=sorted(CLASSES_BY_NAME))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    parser.add_argument("--per-device", type=int, help="samples per worker of another recipe than the perceptron")
    parser.add_argument("--out", type=Path, default=Path(time.strftime("runs/overhead-%Y%m%d-%H%M%S.jsonl")))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("overrides", nargs="*", help="further overrides for the launcher")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(sizes=["4 ms", "12 ms"], accumulation=[1], pairs=6, seconds=1.5)
    options = parser.parse_args()
    if options.strategy != "ddp":
        options.accumulation, options.programs = [1], [name for name in options.programs if name != "accelerate"]
    if "accelerate" in options.programs and find_spec("accelerate") is None:
        parser.error(
            "accelerate is not installed: pip install --constraint constraints.txt --editable '.[benchmarks]', "
            "or type --programs plain launcher"
        )
    options.attempts = options.attempts or 2 * options.pairs
    return options


def make_cases(options: argparse.Namespace) -> list[Case]:
    sizes = {name: ((fields, *options.set), per_device) for name, (fields, per_device) in SIZES.items()}
    if options.recipe != "perceptron" or options.per_device:
        sizes = {options.recipe: (tuple(options.set), options.per_device or 64)}
        options.sizes = list(sizes)
    return [Case(size, *sizes[size], accumulation) for size in options.sizes for accumulation in options.accumulation]


def wait_until_quiet(pairs: Pairs, patience_s: float, *, load_too: bool = False) -> None:
    """Wait until nothing else runs, `load_too`: and until the load average says that nothing did a minute ago.

    Raises:
        MachineBusyError: it took too long.
    """
    limits, deadline = Limits(), time.monotonic() + patience_s
    while True:
        clock = CpuClock()
        time.sleep(1.0)
        use, calibration = clock.read(), calibrate()
        found = find_disturbances([calibration], [use], min(pairs.best_cpu_s, calibration.cpu_s), limits)
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load_too and load > limits.load_per_core * cores:
            found.append(f"the load average is {load:.2f} on {cores} cores")
        if not found:
            return
        if time.monotonic() > deadline:
            raise MachineBusyError(f"It did not become quiet in {patience_s:.0f} s: {'; '.join(found)}")
        print(f"Waiting for a quiet machine: {'; '.join(found)}", file=sys.stderr, flush=True)
        time.sleep(4.0)


def probe_update_s(case: Case, options: argparse.Namespace) -> float:
    """Seconds of an update of the plain script, from a short run that does not count."""
    return run_job(case, "plain", 10, 40, options)[0].wall_s


def measure_pair(case: Case, lengths: Lengths, order: Sequence[str], options: argparse.Namespace) -> Pair:
    """Run each program once, in this order, with a calibration before, between and after them."""
    runs: dict[str, Measurement] = {}
    calibrations: list[Calibration] = [calibrate()]
    uses: list[CpuUse] = []
    for program in order:
        runs[program], use = run_job(case, program, lengths.warmup[program], lengths.measured, options)
        uses.append(use)
        calibrations.append(calibrate())
    return Pair(case.name, runs, calibrations, uses)


def run_job(
    case: Case, program: str, warmup: int, measured: int, options: argparse.Namespace
) -> tuple[Measurement, CpuUse]:
    """Run a program to its end, and wait for all of its processes."""
    per_update = case.accumulation
    marks = [per_update * updates + 1 for updates in (1, warmup, warmup + measured)]
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(HERE)}
        env |= {FOLDER_VARIABLE: name, MARKS_VARIABLE: ",".join(map(str, marks))}
        argv = make_command(case, program, warmup + measured + 1, options)
        clock, start = CpuClock(), time.time()
        done = subprocess.run(argv, cwd=name, env=env, capture_output=True, text=True, check=False)
        wait_for_left_over_processes()
        use = clock.read()
        reports = [Path(name, f"rank{rank}.json") for rank in range(options.workers)]
        # A script on gloo sometimes aborts after its last update, at exit: torch 2.13.
        if not all(report.exists() for report in reports) or (done.returncode and program == "launcher"):
            sys.exit(f"{' '.join(argv)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return make_measurement([json.loads(report.read_text()) for report in reports], start, measured), use


def make_measurement(reports: Sequence[dict], start: float, updates: int) -> Measurement:
    """From the notes of all ranks; wall time is rank 0's."""
    _, begin, end = reports[0]["notes"]
    spent = [rank["notes"][2][key] - rank["notes"][1][key] for rank in reports for key in ("cpu_s", "other_cpu_s")]
    return Measurement(
        wall_s=(end["wall_s"] - begin["wall_s"]) / updates,
        cpu_s=sum(spent) / updates,
        start_s=max(rank["notes"][0]["time"] for rank in reports) - start,
        peak_rss_kb=max(rank["peak_rss_kb"] for rank in reports),
        low_rss_kb=min(rank["peak_rss_kb"] for rank in reports),
        updates=updates,
    )


def wait_for_left_over_processes() -> None:
    """Wait for the processes that a job left behind: they would disturb the next run. The last ones are killed."""
    deadline = time.monotonic() + LEFT_OVER_S
    with suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0 and time.monotonic() > deadline:
                for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
            if pid == 0:
                time.sleep(0.02)


def make_command(case: Case, program: str, updates: int, options: argparse.Namespace) -> list[str]:
    torchrun = [*TORCHRUN, f"--nproc-per-node={options.workers}"]
    if program != "launcher":
        script = {"plain": "plain_ddp.py", "accelerate": "accelerate_loop.py"}[program]
        argv = [*torchrun, str(HERE / script), f"--recipe={options.recipe}", f"--updates={updates}"]
        argv += [f"--per-device={case.per_device}", f"--accumulation={case.accumulation}"]
        argv += [f"--strategy={options.strategy}"] if program == "plain" else []
        return [*argv, "--set", *case.fields] if case.fields else argv
    recipe = "own" if options.recipe == "perceptron" else options.recipe
    return [
        *(*torchrun, "-m", "launcher", f"recipe={recipe}", "recipe.trust=[overhead_workload]"),
        f"recipe._target_=overhead_workload.{CLASSES_BY_NAME[options.recipe]}",
        *(f"recipe.{field}" for field in case.fields),
        *(f"batch.per_device={case.per_device}", f"batch.accumulation={case.accumulation}", "lr.base=0.05"),
        *(f"lr.base_batch={case.per_device * case.accumulation * options.workers}", f"train.duration={updates}ba"),
        *(f"strategy={options.strategy}", "optimizer=sgd", "schedule=constant", "schedule.warmup=0ep"),
        *("train.clip_norm=null", "data.tail=carry", "train.validate_every=null", "checkpoint.every=null"),
        *options.overrides,
    ]


def describe_pair(pair: Pair) -> str:
    runs = (f"{name} {run.wall_s * 1e3:.2f} ms, {run.cpu_s * 1e3:.2f} CPU ms" for name, run in pair.runs.items())
    return "; ".join([*runs, f"others used {max(use.other_share for use in pair.uses):.1%}"])


def describe_case(case: Case) -> str:
    return f"{case.name} ({', '.join(case.fields) or 'defaults'}, {case.per_device} samples per worker and micro-batch)"


def describe_conditions(pairs: Pairs, load: float, minutes: float, options: argparse.Namespace) -> list[str]:
    """Where, with what and how quietly the pairs that count were measured."""
    packages = ["torch", "wandb", "hydra-core", *(["accelerate"] if "accelerate" in options.programs else [])]
    cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].lstrip("\t :") or "CPU"
    quiet, everything = pairs.select_quiet(), pairs.all
    reasons = [reason for pair in everything for reason in pairs.find_disturbances(pair)]
    uses = [use for pair in quiet for use in pair.uses]
    waited = [one.wall_over_cpu for pair in quiet for one in pair.calibrations]
    slowed = [one.cpu_s / pairs.best_cpu_s for pair in quiet for one in pair.calibrations]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return [
        f"{time.strftime('%Y-%m-%d')} · {os.cpu_count()} cores, {cpu} · Linux {platform.release()}, Python "
        f"{platform.python_version()}, {versions} · `benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`, "
        f"{minutes:.0f} minutes · {options.workers} workers, {options.strategy}",
        "",
        f"Load average before: {load:.2f}. {len(quiet)} of {len(everything)} pairs count. During these, other "
        f"processes used at most {max(use.other_share for use in uses):.1%} of the cores and the hypervisor "
        f"{max(use.steal_share for use in uses):.1%}; fixed CPU work beside them took at most {max(waited):.3f} of its "
        f"CPU time, and of its best CPU time {statistics.median(slowed):.3f} (median) to {max(slowed):.3f}.",
        *(f"Thrown away: {reason}." for reason in reasons),
    ]


if __name__ == "__main__":
    main()
