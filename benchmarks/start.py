"""Where the time between a command and the end of its first update goes, beside a bare script under torchrun.

    python benchmarks/start.py                     # torchrun -m launcher, launcher, and the bare script, interleaved
    python benchmarks/start.py --rounds 9 --phases      # also what each process did, one phase a line

CPU time is that of all processes of a job until its first update, and says more than wall time on a shared machine.
The jobs run unchanged: a `sitecustomize` module on their PYTHONPATH notes when the functions named below begin and end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

#: The functions whose begin and end are noted, by module. Nested ones are counted in the outer ones too.
TRACED = {
    "launcher.config.compose": ["resolve"],
    "launcher.launch.worker": ["run_rank", "agree_on_job", "start_watchdog"],
    "launcher.distributed.cleanup_process": ["CleanupProcess.start"],
    "launcher.distributed.starter": ["die_with_starter"],
    "launcher.distributed.rendezvous": ["connect_store", "gather_to_rank0", "broadcast_text", "init_process_group"],
    "launcher.distributed.consistency_check": ["prepare_and_compare"],
    "launcher.run_dir.open_run": ["open_run", "write_run_files"],
    "launcher.recipe": ["build_recipe", "get_dataset_sizes"],
    "launcher.train.rank_setup": ["prepare_rank", "restore_state"],
    "launcher.train.build": ["open_datasets", "build_components", "check_batchnorm_batch_size", "build_model"],
    "launcher.train.session": ["run_session"],
    "launcher.train.context_setup": ["make_context"],
    "launcher.train.rank_outputs": ["RankOutputs.open"],
    "launcher.train.start_events": ["log_start_events"],
    "launcher.train.loss_check": ["check_loss"],
    "launcher.train.loop": ["train"],
    "launcher.strategies.registry": ["build_replica"],
    "launcher.launch.driver": ["resolve_and_open", "TorchrunJob.run"],
    "torch.distributed.distributed_c10d": ["init_process_group", "new_group"],
    "torch.nn.parallel.distributed": ["DistributedDataParallel.__init__"],
}

SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, json, os, sys, time
FOLDER, TRACED = os.environ["START_PROFILE"], json.loads(os.environ["START_TRACED"])
done = False

def stat(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()

def born():
    with open("/proc/uptime") as file:
        return time.time() - float(file.read().split()[0]) + int(stat("self")[19]) / os.sysconf("SC_CLK_TCK")

PID, BORN = os.getpid(), born()

def note(name, wall, cpu, **more):
    facts = {"role": os.environ.get("RANK") or (sys.orig_argv + [""])[2], "span": name, "begin": wall,
             "wall_s": time.time() - wall, "cpu_s": time.process_time() - cpu, **more}
    with open(f"{FOLDER}/{PID}.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\\n")

def sum_cpu_s():
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if FOLDER.encode() in file.read():
                    total += sum(map(int, stat(pid)[11:15]))
        except OSError:
            pass
    return total / os.sysconf("SC_CLK_TCK")

def finish(*_):
    global done
    if not done and os.getpid() == PID:
        done = True
        note("first update", BORN, 0.0, job_cpu_s=sum_cpu_s(), modules=sorted(sys.modules))

def wrap(owner, name, label):
    raw = owner.__dict__[name]
    function = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
    def traced(*args, **kwargs):
        wall, cpu = time.time(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            note(label, wall, cpu)
    traced.__wrapped__, traced.__name__, traced.__doc__ = function, name, function.__doc__
    setattr(owner, name, type(raw)(traced) if isinstance(raw, (classmethod, staticmethod)) else traced)

class Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader
    def __getattr__(self, name):
        return getattr(self.loader, name)
    def create_module(self, spec):
        return self.loader.create_module(spec)
    def exec_module(self, module):
        wall, cpu = time.time(), time.process_time()
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader
        if module.__name__ in IMPORTS:
            note("import " + module.__name__, wall, cpu)
        for path in TRACED.get(module.__name__, ()):
            *owners, name = path.split(".")
            owner = module
            for part in owners:
                owner = getattr(owner, part)
            wrap(owner, name, path)
        if module.__name__ == "torch.optim.optimizer":
            module.register_optimizer_step_post_hook(finish)

IMPORTS = ("torch", "hydra", "omegaconf", "launcher.config.compose", "launcher.train.session", "torch.distributed.run",
           "launcher.launch.worker", "launcher.launch.driver", "numpy", "torch.distributed.fsdp", "deepspeed", "wandb",
           "launcher.recipes.mlp", "launcher.cli.main", "launcher.cli.train", "launcher.distributed.rendezvous",
           "torch._dynamo", "launcher.distributed.watchdog")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in TRACED and name not in IMPORTS and name != "torch.optim.optimizer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec

sys.meta_path.insert(0, Finder())
note("interpreter", BORN, 0.0)
"""

OVERRIDES = ["recipe=mlp", "train.duration=40ba", "batch.per_device=64"]
FIRST_UPDATE = "first update"


@dataclass(frozen=True)
class Span:
    """A phase of one process: `role` is its rank, or the module that it runs."""

    role: str
    span: str
    begin: float
    wall_s: float
    cpu_s: float
    job_cpu_s: float = 0.0
    modules: tuple[str, ...] = ()


def make_commands(workers: int, folder: Path, overrides: list[str]) -> dict[str, list[str]]:
    torchrun = [*TORCHRUN, f"--nproc-per-node={workers}"]
    plain = [str(HERE / "plain_ddp.py"), "--recipe=mlp", "--updates=40"]
    run_dir = f"run.dir={folder / 'run'}"
    return {
        "bare": [*torchrun, *plain],
        "torchrun": [*torchrun, "-m", "launcher", *overrides, run_dir],
        "driver": [sys.executable, "-m", "launcher", *overrides, f"launch.workers={workers}", run_dir],
    }


def run_job(command: list[str], folder: Path, workers: int, tree: str | None) -> tuple[float, list[Span]]:
    """Run a job until every rank has made its first update; return when it began and what its processes noted.

    `tree`: the folder of the version to run, None for the installed one.
    """
    profile, custom = folder / "profile", folder / "custom"
    profile.mkdir()
    custom.mkdir()
    (custom / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = [str(custom), *filter(None, [tree, os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": ":".join(paths)}
    env |= {"START_PROFILE": str(profile), "START_TRACED": json.dumps(TRACED)}
    log, started = (folder / "log").open("w+"), time.time()
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    spans: list[Span] = []
    try:
        while sum(span.span == FIRST_UPDATE for span in spans) < workers:
            if process.poll() is not None:
                log.seek(0)
                sys.exit(f"exit status {process.returncode}: {' '.join(command)}\n{log.read()[-3000:]}")
            time.sleep(0.2)
            lines = [line for file in profile.iterdir() for line in file.read_text().splitlines(keepends=True)]
            spans = [Span(**json.loads(line)) for line in lines if line.endswith("\n")]
    finally:
        end_job(str(profile))
        process.wait()
    return started, spans


def end_job(mark: str) -> None:
    """Kill all processes of the job, which have `mark` in their environment."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_text(errors="replace"):
                os.kill(int(pid), signal.SIGKILL)


def report_totals(kinds: Sequence[str], rounds: Sequence[dict[str, tuple[float, list[Span]]]]) -> None:
    """Print the medians of seconds and CPU seconds, and those of their ratios to the first kind within each round."""
    totals: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for jobs in rounds:
        for kind, (started, spans) in jobs.items():
            ends = [(span.begin + span.wall_s, span.job_cpu_s) for span in spans if span.span == FIRST_UPDATE]
            totals[kind].append((max(ends)[0] - started, max(ends)[1]))
    for kind, values in totals.items():
        wall_s, cpu_s = (statistics.median(column) for column in zip(*values, strict=True))
        pairs = list(zip(values, totals[kinds[0]], strict=True))
        wall, cpu = (statistics.median(own[i] / bare[i] for own, bare in pairs) for i in (0, 1))
        print(f"{kind:15} {wall_s:6.2f} s to the first update ({wall:.2f}), CPU {cpu_s:6.2f} s ({cpu:.2f})", flush=True)


def report_phases(kinds: Sequence[str], rounds: Sequence[dict[str, tuple[float, list[Span]]]]) -> None:
    for kind in kinds:
        rows: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
        for jobs in rounds:
            started, spans = jobs[kind]
            for span in spans:
                rows[span.role, span.span].append((span.begin - started, span.wall_s, span.cpu_s))
        for (role, name), values in sorted(rows.items(), key=lambda row: (row[0][0], row[1][0][0])):
            begin, wall_s, cpu_s = (statistics.median(column) for column in zip(*values, strict=True))
            print(f"{kind:15} {role:30.30} {name:36} at {begin:6.3f} for {wall_s:6.3f} CPU {cpu_s:6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("--modules", action="store_true", help="modules of rank 0 that the bare script does not import")
    parser.add_argument("--kinds", default="bare,torchrun,driver")
    parser.add_argument("--before", metavar="FOLDER", help="also measure the version in this folder")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.before:
        kinds += [f"{kind} before" for kind in kinds if kind != "bare"]
    rounds: list[dict[str, tuple[float, list[Span]]]] = []
    for _ in range(options.rounds):
        jobs = {}
        for kind in kinds:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
                way, _, before = kind.partition(" ")
                command = make_commands(options.workers, Path(name), [*OVERRIDES, *options.overrides])[way]
                tree = options.before if before else None
                jobs[kind] = run_job(command, Path(name), options.workers, tree)
        rounds.append(jobs)
    report_totals(kinds, rounds)
    if options.phases:
        report_phases(kinds, rounds)
    if options.modules:
        last = {kind: {name for span in spans for name in span.modules} for kind, (_, spans) in rounds[-1].items()}
        for kind in kinds[1:]:
            print(kind, *sorted(last[kind] - last[kinds[0]]))


if __name__ == "__main__":
    main()
