"""Text of a Slurm job script from a configuration and its command-line arguments. Nothing is submitted here.

Values in `#SBATCH` lines are checked not to need quotes, everything else is quoted for the shell. The scripts in slurm/
end with the same `SCRIPT_BODY`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.config.slurm_syntax import PLAIN_NAMES, check_launch_keys, format_time_limit, parse_node_range
from launcher.run_dir.run_directory import format_recipe_name

__all__ = ["OUTPUT_PATTERN", "SCRIPT_BODY", "render_sbatch_script"]

OUTPUT_PATTERN = "runs/.slurm/%j.out"
SCRIPT_BODY = r"""
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
# One task per node, whatever the job itself asks for: one torchrun, which starts the workers.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "${survive[@]}" "${container[@]}" bash -c "$agent" bash "$@" "run.dir='$run'" &
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


def render_sbatch_script(config: RunConfig, args: Sequence[str], python: str) -> str:
    """Render the sbatch script. `args`: the arguments after the command; `python`: the interpreter on the nodes.

    Raises:
        UsageError: a launch key has a value that cannot be passed to Slurm.
    """
    check_launch_keys(config.launch)
    low, high = parse_node_range(config.launch.nodes)
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in iter_sbatch_options(config)), "set -u"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in config.launch.env.items()]
    lines += [
        f"PATH={shlex.quote(str(Path(python).parent))}:$PATH",
        f"WORKERS={config.launch.workers or ''}",
        "NODES=$SLURM_JOB_NUM_NODES" if low == high else f"NODES={low}:$SLURM_JOB_NUM_NODES",
        "survive=()" if low == high else "survive=(--no-kill --kill-on-bad-exit=0)",
        "container=()",
        shlex.join(["set", "--", *args]),
    ]
    return "\n".join(lines) + "\n" + SCRIPT_BODY


def iter_sbatch_options(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    low, high = parse_node_range(launch.nodes)
    yield f"--job-name={make_job_name(config)}"
    yield f"--nodes={launch.nodes}"
    if low == high:
        yield "--ntasks-per-node=1"  # with it, Slurm gives a range its least number of nodes even if more are idle
    yield f"--cpus-per-task={(launch.workers or 1) * ((launch.threads or 1) + config.data.num_workers)}"
    yield f"--time={format_time_limit(str(launch.time))}"
    for name in ("partition", "account", "qos", "constraint"):
        if (value := getattr(launch, name)) is not None:
            yield f"--{name}={value}"
    yield "--signal=B:USR1@60"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={OUTPUT_PATTERN}"
    if low != high:
        yield "--no-kill"
    yield from launch.extra


def make_job_name(config: RunConfig) -> str:
    name = config.run.name or format_recipe_name(str(config.recipe.get("_target_", "")))
    return name if PLAIN_NAMES.fullmatch(name) else "launcher"
