"""End a starting job at random moments: SIGKILL leaves no process and no file, SIGTERM ends it within its grace time.

    python benchmarks/kill_anywhere.py [--trials 40] [--window 5] [--seed 0] [kill|term] [driver|torchrun]

Every job runs in a folder and a temporary folder of its own and trains a recipe that starts processes itself. All its
processes inherit a variable, by which those that are left are found. Prints one line per trial, and a line of totals.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

MARK = "KILL_ANYWHERE_TRIAL"
WITHIN_S, GRACE_S, MARGIN_S = 3.0, 5.0, 2.0

RECIPE = """
import subprocess
from dataclasses import dataclass
from launcher.recipes.mlp import Mlp

@dataclass(frozen=True)
class Starting(Mlp):
    def dataset(self, split):
        subprocess.Popen(["sleep", "1000"])
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        return super().dataset(split)
"""
JOB = ["recipe=mlp", "recipe._target_=starting.Starting", "recipe.trust=[starting,launcher.recipes]", "run.name=x"]
JOB += ["sink=[]", "data.num_workers=1", "train.duration=100000ep", f"launch.grace_s={GRACE_S:g}"]
COMMANDS = {
    "driver": [sys.executable, "-m", "launcher", *JOB, "launch.workers=2"],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"),
        *("-m", "launcher", *JOB),
    ],
}


def list_processes(mark: str) -> list[str]:
    """The command lines of the processes that were started with this mark and have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            if f"{MARK}={mark}".encode() in environment and state not in ("Z", "X"):
                found.append(f"{name} " + Path(f"/proc/{name}/cmdline").read_text().replace("\0", " ")[:100])
    return found


def run_trial(target: str, signum: signal.Signals, moment_s: float, mark: str) -> tuple[bool, str]:
    """Start the job, signal `target` after `moment_s`, and return whether all was gone in time, and a description."""
    limit_s = WITHIN_S if signum == signal.SIGKILL else GRACE_S + MARGIN_S
    with tempfile.TemporaryDirectory() as folder:
        work, temporary = Path(folder, "work"), Path(folder, "tmp")
        work.mkdir(), temporary.mkdir()
        (work / "starting.py").write_text(RECIPE)
        env = os.environ | {MARK: mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        null = subprocess.DEVNULL
        process = subprocess.Popen(COMMANDS[target], cwd=work, env=env, stdout=null, stderr=null)
        time.sleep(moment_s)
        rows, before = work / "runs/x/metrics.jsonl", len(list_processes(mark))
        trains = rows.exists() and rows.stat().st_size > 0
        process.send_signal(signum)
        began_s = time.monotonic()
        while list_processes(mark) and time.monotonic() - began_s < limit_s:
            time.sleep(0.05)
        took_s, left = time.monotonic() - began_s, list_processes(mark)
        # a torchrun that is killed leaves its log folder, and torch keeps a cache
        files = [path.name for path in temporary.iterdir() if not path.name.startswith("torch")]
        for line in left:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        status = process.wait()
        saved = any((work / "runs/x/checkpoints").glob("*/manifest.json"))
    facts = f"{before} processes, {'trains' if trains else 'starts'}, status {status}, saved {saved}"
    ok = not left and not files
    return (
        ok,
        f"{target} {signum.name} at {moment_s:.2f} s ({facts}): gone after {took_s:.2f} s {left or ''} {files or ''}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("signal", nargs="?", choices=("kill", "term"), help="default: both")
    parser.add_argument("target", nargs="?", choices=tuple(COMMANDS), help="default: both")
    parser.add_argument("--trials", type=int, default=40, help="of each signal")
    parser.add_argument("--window", type=float, default=5.0, help="seconds after the start")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed = random.Random(options.seed), 0
    for signum in (signal.SIGKILL, signal.SIGTERM):
        if options.signal not in (None, signum.name[3:].lower()):
            continue
        passed = 0
        for number in range(options.trials):
            target = options.target or tuple(COMMANDS)[number % 2]
            ok, line = run_trial(target, signum, rng.uniform(0, options.window), f"{os.getpid()}-{signum}-{number}")
            passed += ok
            print("ok  " if ok else "FAIL", line, flush=True)
        limit_s = WITHIN_S if signum == signal.SIGKILL else GRACE_S + MARGIN_S
        print(f"{signum.name}: {passed} of {options.trials} jobs were gone within {limit_s:g} s", flush=True)
        failed += options.trials - passed
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
