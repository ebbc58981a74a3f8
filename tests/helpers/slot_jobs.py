"""Jobs of worker slots for tests: a stock torchrun, its slots, and trainers without torch that do as a test says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.helpers.jobs import is_alive, wait_for

__all__ = ["AgentForks", "SlotJob", "agent_forks"]

#: torchrun's own `main` in forks of a process that has imported it: an agent then starts at once.
FORKS = """
import json, os, sys
from torch.distributed.run import main

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(request["folder"])
        os.environ.update(request["env"])
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        main(request["argv"])
        sys.exit(0)
    print(json.dumps(pid), flush=True)
"""

#: What both scripts begin with: `step` waits at the moment that the test has named.
COMMON = """
import json, os, signal, sys, time
from pathlib import Path

def step(moment):
    if os.environ.get("MOMENT") == moment:
        note("reached", moment=moment)
        while not Path("go").exists():
            time.sleep(0.005)

def note(event, **facts):
    facts |= {"event": event, "pid": os.getpid(), "number": int(os.environ["LOCAL_RANK"])}
    with open("events", "a") as file:
        file.write(json.dumps(facts) + "\\n")

def restart():
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])
"""
SLOT = """
from launcher.launch.worker_slot import run_slot

def spawn(*args, real=os.posix_spawnp, **options):
    step("before the trainer is started")
    pid = real(*args, **options)
    step("before the trainer is recorded")
    return pid

os.posix_spawnp = spawn
note("slot", restart=restart(), group=os.getpgid(0))
step("before the slot has done anything")
sys.exit(run_slot([sys.executable, "trainer.py"], agent=int(sys.argv[1]) if sys.argv[1:] else None))
"""
TRAINER = """
def on_signal(signum, frame):
    note("signal", signal=signum)
    if signum == signal.SIGTERM and Path("leave").exists():
        exits.append(75)

exits = []
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(signum, on_signal)
step("before the trainer knows its agent")
from launcher.launch import trainer_link
from launcher.launch.trainer_link import TrainerLink

trainer_link.END_LIMIT_S = 60.0  # so that the folder is removed however busy the machine is
link = TrainerLink.start()
note("trainer", restart=restart(), session=os.getsid(0), standard_input=os.readlink("/proc/self/fd/0"))
if Path("expects").exists():
    link.expect_restart(True)
if os.environ.get("MOMENT") == "while a library holds the interpreter":
    import ctypes
    note("reached", moment=os.environ["MOMENT"])
    ctypes.PyDLL(None).sleep(1000)
step("while the trainer runs")
while not exits:
    if start := link.take_start(0.02):
        os.environ.update(start)
        for stream in (sys.stdout, sys.stderr):
            print("restart", restart(), file=stream, flush=True)
        note("restart", restart=restart())
    exit_file = Path(f"exit-{os.environ['LOCAL_RANK']}")
    if exit_file.exists() and exit_file.read_text():
        exits.append(int(exit_file.read_text()))
link.finish(exits[0])
note("finished")
while Path("linger").exists():
    time.sleep(0.005)
sys.exit(exits[0])
"""


class AgentForks:
    """A process that starts agents."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def agent_forks() -> Iterator[AgentForks]:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield AgentForks(process)
        assert process.stdin is not None
        process.stdin.close()


class SlotJob:
    """One agent with its slots and trainers, in a folder of its own; `temp` is the folder of their own folder."""

    def __init__(self, folder: Path, forks: AgentForks) -> None:
        self.folder = folder
        self.temp = Path(tempfile.mkdtemp(prefix="slots-", dir="/tmp"))  # short: it is a part of a socket's path
        self._forks = forks
        self.agent = 0
        (folder / "slot.py").write_text(COMMON + SLOT)
        (folder / "trainer.py").write_text(COMMON + TRAINER)

    def start(self, *options: str, moment: str = "") -> None:
        argv = [
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=9",
            "--monitor-interval=0.05",
            *options,
            "slot.py",
        ]
        env = {"TMPDIR": str(self.temp), "OMP_NUM_THREADS": "1", "MOMENT": moment}
        self.agent = self._forks.ask({"argv": argv, "folder": str(self.folder), "env": env})

    def list_events(self, event: str, **facts: object) -> list[dict[str, Any]]:
        try:
            lines = (self.folder / "events").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in lines]
        return [each for each in found if facts.items() <= each.items() and each["event"] == event]

    def wait_for(self, event: str, count: int = 1, **facts: object) -> list[dict[str, Any]]:
        """Wait for so many events; return them, by number."""
        wait_for(lambda: len(self.list_events(event, **facts)) >= count, within_s=60)
        return sorted(self.list_events(event, **facts), key=lambda each: each["number"])

    def find_running(self, event: str) -> dict[int, int]:
        """The pids of the slots or trainers that run now, by number."""
        found = {each["number"]: each["pid"] for each in self.list_events(event) if is_alive(each["pid"])}
        return dict(sorted(found.items()))

    def tell_to_exit(self, number: int, status: int) -> None:
        (self.folder / f"exit-{number}").write_text(str(status))

    def wait_for_agent(self) -> int:
        """The exit status of torchrun."""
        status: int = self._forks.ask({"wait": self.agent})
        self.agent = 0
        return status

    def list_left(self) -> list[int]:
        """The slots and trainers that run."""
        pids = {each["pid"] for name in ("slot", "trainer", "reached") for each in self.list_events(name)}
        return [pid for pid in pids if is_alive(pid)]

    def wait_until_nothing_is_left(self) -> None:
        wait_for(lambda: not self.list_left() and not any(self.temp.glob("launcher-slots-*")), within_s=60)

    def close(self) -> None:
        """End what the test has left."""
        (self.folder / "go").touch()
        if self.agent:
            with suppress(ProcessLookupError):
                os.kill(self.agent, signal.SIGKILL)
            self._forks.ask({"wait": self.agent})
        for pid in self.list_left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.temp, ignore_errors=True)
