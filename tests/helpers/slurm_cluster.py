"""A real Slurm for tests: a controller, munge and three simulated nodes on this machine, in one folder.

Partitions: `low` (the default; its jobs may be preempted, get USR1 as a warning, and are requeued) and `high`. Nothing
of the machine's own Slurm is read or changed; three lines are added to /etc/hosts and removed again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.helpers.jobs import is_alive, list_descendants, wait_for

__all__ = ["NODES", "Slurm", "find_missing_programs"]

HOSTS = Path("/etc/hosts")
NODES = {"node1": "127.0.0.21", "node2": "127.0.0.22", "node3": "127.0.0.23"}
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")

#: cred_expire is how long Slurm holds back a requeued job; below 5 s it uses its default of 120.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
SlurmdTimeout=10
KillWait=5
MinJobAge=600
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
PartitionName=low Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr={address} Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN\n"


def find_missing_programs() -> str | None:
    """Explain why Slurm cannot run here; None if it can."""
    if os.geteuid() != 0:
        return "a Slurm of the tests' own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)" if absent else None
    )


class Slurm:
    """The cluster, from entering the context to leaving it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._exit_stack = ExitStack()

    @property
    def env(self) -> dict[str, str]:
        """Environment variables that the client commands need to find the cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Slurm:
        with self._exit_stack:  # what was started is stopped if a later step fails
            self._add_host_lines()
            self._exit_stack.callback(self._stop_daemons)
            self._configure()
            self._start("munged", *self._make_munge_command())
            self._start("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
            for node in NODES:
                self.start_node(node)
            wait_for(lambda: self.list_node_states() == dict.fromkeys(NODES, "idle"))
            self._exit_stack = self._exit_stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit_stack.close()

    # --- for tests ---------------------------------------------------------------------------------------------------

    def run_client(self, *argv: str) -> str:
        """Return the output of a Slurm command."""
        done = subprocess.run(argv, env=os.environ | self.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *argv: str, cwd: Path, env: Mapping[str, str]) -> str:
        """Submit a job and return its id; its output goes to `<id>.out` in `cwd`."""
        command = ["sbatch", "--parsable", "--output=%A.out", *argv]
        done = subprocess.run(command, cwd=cwd, env={**env, **self.env}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def get_job_state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, …"""
        return self.show_job(job)["JobState"]

    def show_job(self, job: str) -> dict[str, str]:
        shown = self.run_client("scontrol", "-o", "show", "job", job).split("\n")[0]
        return dict(word.split("=", 1) for word in shown.split(" ") if "=" in word)

    def list_node_states(self) -> dict[str, str]:
        lines = self.run_client("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def kill_node(self, node: str) -> None:
        """Simulate a power cut: kill the node's daemon and everything that runs on it at once."""
        daemon = self._daemons.pop(f"slurmd {node}")
        for pid in (daemon.pid, *self._list_step_processes(node)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
        self.run_client("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def start_node(self, node: str) -> None:
        self._start(f"slurmd {node}", "slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", node)

    def restore_node(self, node: str) -> None:
        """Bring a lost node back."""
        self.start_node(node)
        self.run_client("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(lambda: self.list_node_states()[node] == "idle")

    def cancel_all_jobs(self) -> None:
        """Cancel every job and wait until the nodes are free."""
        subprocess.run(["scancel", "--user=root"], env=os.environ | self.env, check=False)
        wait_for(lambda: not self.run_client("squeue", "-h"))

    # --- setup and teardown ------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        port, *ports = find_free_ports(1 + len(NODES))
        text = CONF.format(host=socket.gethostname().partition(".")[0], port=port, folder=self.folder)
        for (name, address), at in zip(NODES.items(), ports, strict=True):
            text += NODE.format(name=name, address=address, port=at)
        (self.folder / "slurm.conf").write_text(text)

    def _make_munge_command(self) -> Sequence[str]:
        """Munge requires its folder to be private and the folder of its socket to be accessible to all."""
        private = self.folder / "munge"
        private.mkdir(mode=0o700)
        (private / "key").write_bytes(os.urandom(1024))
        (private / "key").chmod(0o600)
        self.folder.chmod(0o755)
        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={private / name}" for option, name in files.items()]
        return ("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *options)

    def _start(self, name: str, *argv: str) -> None:
        with (self.folder / f"{name}.err").open("wb") as log:
            self._daemons[name] = subprocess.Popen(
                argv, env=os.environ | self.env, stdout=log, stderr=log, start_new_session=True
            )
        if name == "munged":
            wait_for((self.folder / "munge.socket").exists)

    def _list_step_processes(self, node: str) -> list[int]:
        """Return the processes of every step on a node: the step daemons, recognised by name, and their descendants."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (path / "environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in variables and self._is_own(variables):
                    found.append(int(path.name))
        return found

    def _is_own(self, variables: Sequence[bytes]) -> bool:
        return f"SLURM_CONF={self.folder}/slurm.conf".encode() in variables

    def _add_host_lines(self) -> None:
        """Rewrite in place, since /etc/hosts may be a mount."""
        mark = f"# launcher tests {os.getpid()}"
        before = HOSTS.read_text()
        lines = "".join(f"{address} {name} {mark}\n" for name, address in NODES.items())
        HOSTS.write_text(before.rstrip("\n") + "\n" + lines)
        self._exit_stack.callback(remove_host_lines, mark)

    def _stop_daemons(self) -> None:
        with suppress(Exception):
            self.cancel_all_jobs()
        started = [pid for daemon in self._daemons.values() for pid in (daemon.pid, *list_descendants(daemon.pid))]
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        for pid in filter(is_alive, started):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove_host_lines(mark: str) -> None:
    kept = [line for line in HOSTS.read_text().splitlines(keepends=True) if mark not in line]
    HOSTS.write_text("".join(kept))


def find_free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
