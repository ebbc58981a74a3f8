"""Text of a Slurm job script from a configuration and its command-line arguments. Nothing is submitted here.

Values in `#SBATCH` lines are checked not to need quotes, everything else is quoted for the shell. `BODY` is also the
second part of the scripts in slurm/.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.errors import RequestError
from launcher.runfolder import recipe_name
from launcher.settings import LaunchSettings, Run

__all__ = ["BODY", "OUTPUT", "check_launch", "minutes", "node_range", "render"]

OUTPUT = "runs/.slurm/%j.out"

#: Values allowed in an #SBATCH line: nothing that Slurm's option parser or a shell would split or expand.
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*(,[A-Za-z0-9][A-Za-z0-9_.@+-]*)*")
CONSTRAINT = re.compile(r"[A-Za-z0-9_.,&|*()\[\]:=!+-]+")
EXTRA = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:;/@%+=*&|()\[\]!{}^~-]+)?")
NODES = re.compile(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5}))?")
UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}
SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)")
SLURM_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
#: Options that have their own configuration key; FIXED are options that the script depends on.
TAKEN = {
    "--account": "launch.account",
    "--constraint": "launch.constraint",
    "--job-name": "run.name",
    "--nodes": "launch.nodes",
    "--partition": "launch.partition",
    "--qos": "launch.qos",
    "--time": "launch.time",
}
FIXED = ("--array", "--no-requeue", "--ntasks", "--ntasks-per-node", "--parsable", "--signal", "--test-only", "--wrap")

BODY = r"""
# --- identical from here on in train.sbatch, elastic.sbatch and the script that launch=slurm submits ------------------

run=$(python -m launcher folder "$@") || exit # the run directory; on wrong arguments one error line and exit
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -e "$run/done.json" ]; then exit 0; fi

# The first node hosts the rendezvous.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export HEAD PORT NODES WORKERS

# Runs on every node; single quotes, so that variables expand there. torchrun ignores USR1; the workers save and exit.
# shellcheck disable=SC2016
agent='trap "" USR1
exec python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="${WORKERS:-${SLURM_GPUS_ON_NODE:-1}}" \
  --max-restarts=2 --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-conf="is_host=$((SLURM_NODEID == 0)),last_call_timeout=5,keep_alive_interval=2" \
  --local-addr="$SLURMD_NODENAME" -m launcher "$@"'
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarting workers in place is more reliable without it

# Slurm sends USR1 before the time limit or preemption; forward it to the workers, which save and exit.
warned=
trap 'warned=yes; echo "signal from Slurm: saving at the next update, then requeueing"
  scancel --quiet --signal=USR1 "$SLURM_JOB_ID"' USR1
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${survive[@]}" "${container[@]}" \
  bash -c "$agent" bash "$@" "run.dir='$run'" &
step=$!
while kill -0 "$step" 2>/dev/null; do
  # Repeat every five seconds, since a worker that is still starting misses the signal.
  if [ -n "$warned" ] && [ $((SECONDS % 5)) = 0 ]; then scancel --quiet --signal=USR1 "$SLURM_JOB_ID"; fi
  sleep 1
done
wait "$step"
status=$?

# The files in the run directory decide: losing a node also gives a non-zero status.
if [ "$run/done.json" -nt "$run/slurm.json" ]; then exit 0; fi
if [ "$run/stop" -nt "$run/slurm.json" ]; then exit 0; fi # launcher stop
if [ -z "$warned" ] && [ "$status" = 0 ]; then exit 0; fi
if [ -z "$warned" ]; then python -m launcher again "$run" || exit "$status"; fi
scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends this script here; the next start resumes
exit 1
"""


def render(run: Run, words: Sequence[str], python: str) -> str:
    """Render the sbatch script. `words`: the arguments after the command; `python`: the interpreter on the nodes.

    Raises:
        RequestError: a launch key has a value that cannot be passed to Slurm.
    """
    check_launch(run.launch)
    low, high = node_range(run.launch.nodes)
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options(run)), "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in run.launch.env.items()]
    lines += [
        f"PATH={shlex.quote(str(Path(python).parent))}:$PATH",
        f"WORKERS={run.launch.workers or ''}",
        "NODES=$SLURM_JOB_NUM_NODES" if low == high else f"NODES={low}:$SLURM_JOB_NUM_NODES",
        "survive=()" if low == high else "survive=(--no-kill --kill-on-bad-exit=0)",
        "container=()",
        shlex.join(["set", "--", *words]),
    ]
    return "\n".join(lines) + "\n" + BODY


def options(run: Run) -> Iterator[str]:
    launch = run.launch
    low, high = node_range(launch.nodes)
    yield f"--job-name={job_name(run)}"
    yield f"--nodes={launch.nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={(launch.workers or 1) * ((launch.threads or 1) + run.data.workers)}"
    yield f"--time={minutes(str(launch.time))}"
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(launch, name)) is not None:
            yield f"--{name}={value}"
    yield "--signal=B:USR1@60"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={OUTPUT}"
    if low != high:
        yield "--no-kill"
    yield from launch.extra


def job_name(run: Run) -> str:
    name = run.run.name or recipe_name(str(run.recipe.get("_target_", "")))
    return name if PLAIN.fullmatch(name) else "launcher"


# --- validation of the keys ---------------------------------------------------------------------------------------


def check_launch(launch: LaunchSettings) -> None:
    """Raise RequestError for the first launch key whose value is not valid in an #SBATCH line."""
    node_range(launch.nodes)
    if launch.time is None:
        raise RequestError("launch.time is missing: type how long the job may run, e.g. launch.time=4h")
    minutes(launch.time)
    for name in ("partition", "account", "qos"):
        value = getattr(launch, name)
        if value is not None and not PLAIN.fullmatch(value):
            raise RequestError(f"launch.{name}={one_line(value)}: type letters, digits and any of _ . @ + - ,")
    if launch.constraint is not None and not CONSTRAINT.fullmatch(launch.constraint):
        raise RequestError(f"launch.constraint={one_line(launch.constraint)}: type features and & | [ ] ( ) * only")
    for option in launch.extra:
        check_extra(option)


def check_extra(option: str) -> None:
    given = f"launch.extra=[{one_line(option)}]"
    if not EXTRA.fullmatch(option):
        raise RequestError(f"{given}: type options as --name=value without spaces or quotes, e.g. --gpus-per-node=4")
    name = option.partition("=")[0]
    if name in TAKEN:
        raise RequestError(f"{given}: {name} has its own key: type {TAKEN[name]}=")
    if name in FIXED:
        raise RequestError(f"{given}: {name} cannot be changed here: copy slurm/train.sbatch and edit the copy")


def node_range(text: str) -> tuple[int, int]:
    """Parse `2` or `2-4` into (minimum, maximum) nodes."""
    found = NODES.fullmatch(text)
    if found is None or int(found[1]) > int(found[2] or found[1]):
        raise RequestError(f"launch.nodes={one_line(text)}: type a number or a range, e.g. launch.nodes=2 or 2-4")
    return int(found[1]), int(found[2] or found[1])


def minutes(text: str) -> str:
    """Convert a time to Slurm's format: `4h`, `30min`, `2d` to minutes, rounded up; Slurm's own formats unchanged."""
    if found := SPAN.fullmatch(text):
        whole = math.ceil(float(found[1]) * UNITS_S[found[2]] / 60)
        if whole:
            return str(whole)
    elif SLURM_TIME.fullmatch(text) and re.search("[1-9]", text):
        return text
    raise RequestError(f"launch.time={one_line(text)}: type launch.time=4h, 30min, 2d, or Slurm's own 1-12:00:00")


def one_line(text: str) -> str:
    return " ".join(text.split())
