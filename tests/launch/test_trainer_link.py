"""The trainer's side of a slot, with real trainers: the test is their slot, and a sleeping process is their agent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED
from launcher.launch import worker_slot
from launcher.launch.slot_folder import SlotFolder
from launcher.launch.slot_messages import SlotMessage, TrainerAddress, open_slot_socket
from launcher.launch.trainer_link import TrainerLink
from launcher.launch.worker_slot import SlotTrainer, adopt_trainer, start_trainer
from launcher.system.processes import identify_process
from tests.helpers.jobs import wait_for

#: Writes what it gets to the file `said`, and ends with the status in the file `exit`.
TRAINER = """
import os, signal, sys, threading, time
from pathlib import Path

def say(text):
    with open("said", "a") as file:
        file.write(f"{text}\\n")

signal.signal(signal.SIGUSR1, lambda *_: say("SIGUSR1"))
say("began")
while Path("wait").exists():
    time.sleep(0.005)
from launcher.launch import trainer_link

def record_when_the_limit_is_over(*args, real=trainer_link.SlotFolder.record_status):
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.join()
    real(*args)

if Path("slow").exists():
    trainer_link.END_LIMIT_S = 5.0
    trainer_link.SlotFolder.record_status = record_when_the_limit_is_over
elif not Path("in a hurry").exists():
    trainer_link.END_LIMIT_S = 60.0  # so that the folder is removed however busy the machine is
link = trainer_link.TrainerLink.start()
if Path("fork").exists() and os.fork() == 0:
    say("forked")
    while Path("fork").exists():
        time.sleep(0.005)
    os._exit(0)
say(f"rank {os.environ['RANK']}")
while not (Path("exit").exists() and Path("exit").read_text()):
    if start := link.take_start(0.02):
        say(f"now rank {start['RANK']}")
link.finish(int(Path("exit").read_text()))
while Path("linger").exists():
    time.sleep(0.005)
sys.exit(int(Path("exit").read_text()))
"""


class Surroundings:
    """A trainer's agent, folder and working directory; the test stands for its slots."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._temp = tempfile.mkdtemp(prefix="link-", dir="/tmp")  # short, because it is a part of a socket's path
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TMPDIR", self._temp)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        (folder / "trainer.py").write_text(TRAINER)
        self.agent = subprocess.Popen(["sleep", "1000"])
        self.agent_identity = str(identify_process(self.agent.pid))
        self.slots = SlotFolder.of_agent(self.agent_identity)
        self._children: list[int] = []

    def start_trainer(self, rank: int = 0, agent: str | None = None) -> SlotTrainer:
        self._monkeypatch.setenv("RANK", str(rank))
        command = [sys.executable, "trainer.py"]
        with self.slots.lock(create=True):
            trainer = start_trainer(self.slots, 0, agent or self.agent_identity, command, set())
        self._children.append(get_pid(trainer))
        return trainer

    def adopt_trainer(self, rank: int) -> SlotTrainer:
        """Be a new slot of the trainer that runs."""
        self._monkeypatch.setenv("RANK", str(rank))
        with self.slots.lock():
            trainer = adopt_trainer(self.slots, 0)
        assert trainer is not None
        return trainer

    def wait_for_exit(self, trainer: SlotTrainer) -> int:
        wait_for(
            lambda: os.waitid(os.P_PID, get_pid(trainer), os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None, within_s=60
        )
        self._children.remove(get_pid(trainer))
        return os.waitstatus_to_exitcode(os.waitpid(get_pid(trainer), 0)[1])

    def read_said(self) -> list[str]:
        said = self.folder / "said"
        return said.read_text().splitlines() if said.exists() else []

    def wait_until_said(self, *lines: str) -> None:
        wait_for(lambda: self.read_said() == list(lines), within_s=60)

    def end_agent(self) -> None:
        self.agent.kill()
        self.agent.wait()

    def close(self) -> None:
        (self.folder / "fork").unlink(missing_ok=True)
        self.end_agent()
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        shutil.rmtree(self._temp)


def get_pid(trainer: SlotTrainer) -> int:
    return int(trainer.identity.partition("-")[0])


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    around = Surroundings(tmp_path, monkeypatch)
    yield around
    around.close()


def wait_for_message(link: socket.socket) -> SlotMessage:
    link.settimeout(60)
    kind, _, value = link.recv(1000).partition(b" ")
    return SlotMessage(kind, value)


def test_trainer_gets_the_variables_of_each_start(around: Surroundings) -> None:
    around.start_trainer(rank=0)
    around.wait_until_said("began", "rank 0")
    around.adopt_trainer(rank=3)
    around.wait_until_said("began", "rank 0", "now rank 3")


def test_trainer_that_still_starts_gets_the_newest_variables(around: Surroundings) -> None:
    """Its first slot was replaced before it ran its first line."""
    (around.folder / "wait").touch()
    first = around.start_trainer(rank=0)
    first.link.close()
    around.adopt_trainer(rank=1).link.close()
    around.adopt_trainer(rank=2)
    (around.folder / "wait").unlink()
    wait_for(lambda: around.read_said()[-1:] in (["rank 2"], ["now rank 2"]), within_s=60)


def test_newest_slot_has_the_trainer(around: Surroundings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = around.start_trainer(rank=0)
    second = around.adopt_trainer(rank=1)
    assert wait_for_message(first.link).kind == SlotMessage.REPLACED
    monkeypatch.setattr(worker_slot, "read_start_time", lambda _: 1)  # a slot that was started long before
    old = around.adopt_trainer(rank=2)
    assert wait_for_message(old.link).kind == SlotMessage.REPLACED
    SlotMessage(SlotMessage.SIGNAL, b"%d" % signal.SIGKILL).send(first.link)
    SlotMessage(SlotMessage.SIGNAL, b"%d" % signal.SIGKILL).send(old.link)
    SlotMessage(SlotMessage.SIGNAL, b"%d" % signal.SIGUSR1).send(second.link)
    wait_for(lambda: "SIGUSR1" in around.read_said(), within_s=60)
    assert "now rank 2" not in around.read_said()


def test_trainer_goes_on_without_a_slot(around: Surroundings) -> None:
    around.start_trainer(rank=0).link.close()
    around.wait_until_said("began", "rank 0")
    around.adopt_trainer(rank=1).link.close()
    around.wait_until_said("began", "rank 0", "now rank 1")
    around.adopt_trainer(rank=2)
    around.wait_until_said("began", "rank 0", "now rank 1", "now rank 2")


def test_status_is_told_to_every_later_slot(around: Surroundings) -> None:
    (around.folder / "linger").touch()
    trainer = around.start_trainer()
    (around.folder / "exit").write_text("7")
    assert wait_for_message(trainer.link) == SlotMessage(SlotMessage.STATUS, b"7")
    assert wait_for_message(around.adopt_trainer(rank=0).link) == SlotMessage(SlotMessage.STATUS, b"7")
    (around.folder / "linger").unlink()
    assert around.wait_for_exit(trainer) == 7
    with around.slots.lock():
        assert around.slots.read_status(0, trainer.identity) == 7


def test_what_is_no_message_ends_no_watch(around: Surroundings) -> None:
    trainer = around.start_trainer()
    for packet in (b"start", b"start x", b"start 5\0NAME", b"signal x", b"signal 5000", b"\xff\0", b"unknown 1"):
        trainer.link.send(packet)
    around.wait_until_said("began", "rank 0")
    around.adopt_trainer(rank=1)
    around.wait_until_said("began", "rank 0", "now rank 1")
    around.end_agent()
    assert around.wait_for_exit(trainer) in (1, -signal.SIGKILL)


# --- the end of the agent ---------------------------------------------------------------------------------------------


def test_trainer_ends_with_its_agent_and_removes_the_folder(around: Surroundings) -> None:
    trainer = around.start_trainer()
    around.wait_until_said("began", "rank 0")
    around.end_agent()
    assert around.wait_for_exit(trainer) == EXIT_FAILED
    assert not Path(around.slots.path).exists()


def test_limit_of_the_end_is_on_the_wait_for_the_lock_alone(around: Surroundings) -> None:
    (around.folder / "slow").touch()
    trainer = around.start_trainer()
    around.wait_until_said("began", "rank 0")
    around.end_agent()
    assert around.wait_for_exit(trainer) == EXIT_FAILED
    assert not Path(around.slots.path).exists()


def test_trainer_ends_although_a_stopped_process_holds_the_lock(around: Surroundings) -> None:
    (around.folder / "in a hurry").touch()
    trainer = around.start_trainer()
    around.wait_until_said("began", "rank 0")
    with around.slots.lock():
        around.end_agent()
        assert around.wait_for_exit(trainer) == EXIT_FAILED


def test_trainer_ends_whose_agent_has_ended_before_its_watch_began(around: Surroundings) -> None:
    (around.folder / "wait").touch()
    trainer = around.start_trainer()
    around.end_agent()
    (around.folder / "wait").unlink()
    assert around.wait_for_exit(trainer) == EXIT_FAILED
    assert around.read_said() == ["began"]
    assert not Path(around.slots.path).exists()


def test_process_with_the_agents_pid_is_not_taken_for_it(around: Surroundings) -> None:
    trainer = around.start_trainer(agent=f"{around.agent.pid}-1")
    assert around.wait_for_exit(trainer) == EXIT_FAILED
    assert around.agent.poll() is None


# --- one trainer for each slot ----------------------------------------------------------------------------------------


def test_trainer_that_was_left_unrecorded_records_itself(around: Surroundings) -> None:
    """Its slot was killed between the start of the trainer and the record."""
    (around.folder / "wait").touch()
    trainer = around.start_trainer()
    os.unlink(around.slots.locate_record(0))
    (around.folder / "wait").unlink()
    around.wait_until_said("began", "rank 0")
    with around.slots.lock():
        assert around.slots.list_trainers() == {0: trainer.identity}


def test_trainer_ends_that_was_replaced_before_it_recorded_itself(around: Surroundings) -> None:
    (around.folder / "wait").touch()
    first = around.start_trainer()
    os.unlink(around.slots.locate_record(0))
    second = around.start_trainer()
    (around.folder / "wait").unlink()
    assert around.wait_for_exit(first) == EXIT_FAILED
    around.wait_until_said("began", "began", "rank 0")
    with around.slots.lock():
        assert around.slots.list_trainers() == {0: second.identity}


def test_trainer_ends_whose_folder_was_removed(around: Surroundings) -> None:
    (around.folder / "wait").touch()
    trainer = around.start_trainer()
    shutil.rmtree(around.slots.path)
    (around.folder / "wait").unlink()
    assert around.wait_for_exit(trainer) == EXIT_FAILED


def test_trainer_that_cannot_be_reached_is_killed_before_another_starts(around: Surroundings) -> None:
    trainer = around.start_trainer()
    around.wait_until_said("began", "rank 0")
    os.unlink(around.slots.locate_socket(0))
    with around.slots.lock():
        assert adopt_trainer(around.slots, 0) is None
    assert around.wait_for_exit(trainer) == -signal.SIGKILL


@pytest.mark.parametrize("removed", ["record", "folder"])
def test_trainer_whose_record_is_removed_is_killed_before_another_starts(around: Surroundings, removed: str) -> None:
    first = around.start_trainer()
    around.wait_until_said("began", "rank 0")
    if removed == "record":
        os.unlink(around.slots.locate_record(0))
    else:
        shutil.rmtree(around.slots.path)
    around.start_trainer(rank=1)
    assert around.wait_for_exit(first) == -signal.SIGKILL
    around.wait_until_said("began", "rank 0", "began", "rank 1")


def test_trainer_ends_where_another_process_has_the_claim_of_its_slot(around: Surroundings) -> None:
    with open_slot_socket() as other:
        other.bind(TrainerAddress("", 0, around.agent_identity, 0).name_claim())
        trainer = around.start_trainer()
        assert around.wait_for_exit(trainer) == EXIT_FAILED
    assert around.read_said() == ["began"]


def test_process_that_a_trainer_has_forked_does_not_keep_its_slot(around: Surroundings) -> None:
    """As a data loader's worker, which ends some seconds after a trainer that is killed."""
    (around.folder / "fork").touch()
    first = around.start_trainer()
    wait_for(lambda: sorted(around.read_said()) == ["began", "forked", "rank 0"])
    os.kill(get_pid(first), signal.SIGKILL)
    around.wait_for_exit(first)
    around.start_trainer(rank=1)
    wait_for(lambda: "rank 1" in around.read_said())


def test_process_that_no_slot_has_started_has_no_link() -> None:
    assert TrainerLink.start() is None
