"""Worker slots under a stock torchrun: what happens to them and to their trainers, with real processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED
from launcher.launch.slot_folder import SlotFolder
from launcher.system.processes import identify_process
from tests.helpers.jobs import is_alive, make_env, wait_for
from tests.helpers.slot_jobs import AgentForks, SlotJob, agent_forks

pytestmark = pytest.mark.process

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module")
def forks() -> Iterator[AgentForks]:
    with agent_forks() as forks:
        yield forks


@pytest.fixture
def job(tmp_path: Path, forks: AgentForks) -> Iterator[SlotJob]:
    job = SlotJob(tmp_path, forks)
    yield job
    job.close()


def start_trainers(job: SlotJob, *options: str) -> dict[int, int]:
    """Start two slots; return the pids of their trainers."""
    job.start(*options)
    job.wait_for("trainer", 2)
    return job.find_running("trainer")


def read_output(job: SlotJob) -> str:
    return (job.folder / "output").read_text()


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_killed_trainer_is_replaced_and_the_other_goes_on(job: SlotJob) -> None:
    trainers = start_trainers(job)
    os.kill(trainers[1], signal.SIGKILL)
    job.wait_for("restart", number=0, restart=1, pid=trainers[0])
    (new,) = job.wait_for("trainer", number=1, restart=1)
    assert job.find_running("trainer") == {0: trainers[0], 1: new["pid"]}
    assert "exitcode: -9" in read_output(job), "torchrun sees how the trainer has ended"


def test_killed_slot_costs_no_trainer(job: SlotJob) -> None:
    trainers = start_trainers(job)
    for restart, number in ((1, 0), (2, 1), (3, 1)):
        os.kill(job.find_running("slot")[number], signal.SIGKILL)
        job.wait_for("restart", 2, restart=restart)
    assert job.find_running("trainer") == trainers
    assert len(job.list_events("trainer")) == 2


def test_adopted_trainer_that_is_killed_is_replaced(job: SlotJob) -> None:
    """The slot that stands for it is not its parent."""
    trainers = start_trainers(job)
    os.kill(job.find_running("slot")[0], signal.SIGKILL)
    job.wait_for("restart", 2, restart=1)
    os.kill(trainers[1], signal.SIGKILL)
    job.wait_for("trainer", number=1, restart=2)
    job.wait_for("restart", number=0, restart=2, pid=trainers[0])


def test_all_trainers_killed_at_once_are_replaced(job: SlotJob) -> None:
    trainers = start_trainers(job)
    for pid in trainers.values():
        os.kill(pid, signal.SIGKILL)
    wait_for(
        lambda: (
            len(job.find_running("trainer")) == 2
            and not set(job.find_running("trainer").values()) & set(trainers.values())
        )
    )


def test_slot_killed_before_its_trainer_is_recorded_leaves_one_trainer(job: SlotJob) -> None:
    job.start(moment="before the trainer is recorded")
    (first, *_) = job.wait_for("reached")
    os.kill(first["pid"], signal.SIGKILL)
    (job.folder / "go").touch()
    wait_for(lambda: len(job.find_running("trainer")) == 2)
    job.wait_for("slot", 2, restart=1)
    wait_for(lambda: len(list(job.temp.glob("*/*.trainer"))) == 2)
    (recorded,) = job.temp.glob("launcher-slots-*")
    for number, pid in job.find_running("trainer").items():
        assert (recorded / f"{number}.trainer").read_text() == identify_process(pid)


def test_workers_that_are_all_told_local_rank_0_have_slots_of_their_own(job: SlotJob) -> None:
    job.start("--virtual-local-rank")
    trainers = {each["pid"] for each in job.wait_for("trainer", 2)}
    os.kill(job.list_events("slot")[0]["pid"], signal.SIGKILL)
    assert {each["pid"] for each in job.wait_for("restart", 2, restart=1)} == trainers


# --- ends -------------------------------------------------------------------------------------------------------------


def test_trainer_that_goes_on_writes_to_the_output_of_its_new_slot(job: SlotJob) -> None:
    """With --redirects, torchrun makes a file for each start."""
    start_trainers(job, "--redirects=3", "--log-dir=logs")
    os.kill(job.find_running("slot")[0], signal.SIGKILL)
    job.wait_for("restart", 2)
    for number in range(2):
        for name in ("stdout.log", "stderr.log"):
            (first,) = job.folder.glob(f"logs/*/attempt_0/{number}/{name}")
            (second,) = job.folder.glob(f"logs/*/attempt_1/{number}/{name}")
            assert "restart" not in first.read_text()
            assert second.read_text() == "restart 1\n"


def test_job_whose_trainers_succeed_succeeds(job: SlotJob) -> None:
    start_trainers(job)
    (folder,) = job.temp.glob("launcher-slots-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    job.tell_to_exit(0, 0)
    wait_for(lambda: 0 not in job.find_running("slot"))
    assert folder.exists()
    job.tell_to_exit(1, 0)
    assert job.wait_for_agent() == 0
    job.wait_until_nothing_is_left()


@pytest.mark.parametrize("adopted", [False, True])
def test_slot_exits_with_the_status_of_its_trainer(job: SlotJob, adopted: bool) -> None:
    start_trainers(job, f"--max-restarts={int(adopted)}")
    if adopted:
        os.kill(job.find_running("slot")[0], signal.SIGKILL)
        job.wait_for("restart", 2)
    (job.folder / "leave").touch()
    job.tell_to_exit(1, 3)
    assert job.wait_for_agent() == 1
    assert "exitcode: 3) local_rank: 1" in read_output(job)
    job.wait_until_nothing_is_left()


@pytest.mark.parametrize(
    "moment",
    [
        "before the slot has done anything",
        "before the trainer is started",
        "before the trainer is recorded",
        "before the trainer knows its agent",
        "while the trainer runs",
        "while a library holds the interpreter",
    ],
)
def test_nothing_outlives_a_torchrun_that_is_killed(job: SlotJob, moment: str) -> None:
    job.start(moment=moment)
    job.wait_for("reached")
    os.kill(job.agent, signal.SIGKILL)
    job.wait_for_agent()
    (job.folder / "go").touch()
    job.wait_until_nothing_is_left()


def test_trainers_without_slots_end_with_a_torchrun_that_is_killed(job: SlotJob) -> None:
    start_trainers(job)
    slots = job.find_running("slot")
    for pid in (*slots.values(), job.agent):
        os.kill(pid, signal.SIGSTOP)
    for pid in (*slots.values(), job.agent):
        os.kill(pid, signal.SIGKILL)
    job.wait_for_agent()
    job.wait_until_nothing_is_left()


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_signal_to_a_slot_reaches_its_trainer_alone(job: SlotJob, signum: int) -> None:
    trainers = start_trainers(job)
    slots = job.find_running("slot")
    os.kill(slots[1], signum)
    job.wait_for("signal", signal=int(signum))
    assert [each["pid"] for each in job.list_events("signal")] == [trainers[1]]
    assert job.find_running("slot") == slots


def test_signal_reaches_a_trainer_that_was_given_to_another_slot(job: SlotJob) -> None:
    trainers = start_trainers(job)
    os.kill(job.find_running("slot")[0], signal.SIGKILL)
    job.wait_for("restart", 2)
    os.kill(job.find_running("slot")[0], signal.SIGUSR1)
    (received,) = job.wait_for("signal")
    assert (received["pid"], received["signal"]) == (trainers[0], signal.SIGUSR1)


def test_sigterm_to_torchrun_lets_the_trainers_save(job: SlotJob) -> None:
    trainers = start_trainers(job)
    (job.folder / "leave").touch()
    os.kill(job.agent, signal.SIGTERM)
    assert job.wait_for_agent() != 0
    assert sorted(each["pid"] for each in job.wait_for("signal", 2, signal=15)) == sorted(trainers.values())
    job.wait_until_nothing_is_left()


def test_sigterm_to_torchrun_lets_the_last_trainer_save_when_others_have_finished(job: SlotJob) -> None:
    trainers = start_trainers(job)
    slots = job.find_running("slot")
    job.tell_to_exit(0, 0)
    wait_for(lambda: not is_alive(slots[0]))
    (job.folder / "leave").touch()
    os.kill(job.agent, signal.SIGTERM)
    assert job.wait_for_agent() != 0
    assert [each["pid"] for each in job.wait_for("signal", signal=15)] == [trainers[1]]
    job.wait_until_nothing_is_left()


def test_trainers_may_save_when_torchrun_has_no_restarts_left(job: SlotJob) -> None:
    trainers = start_trainers(job, "--max-restarts=0")
    (job.folder / "leave").touch()
    os.kill(trainers[1], signal.SIGKILL)
    assert job.wait_for_agent() == 1
    assert [each["pid"] for each in job.wait_for("signal", signal=15)] == [trainers[0]]
    job.wait_until_nothing_is_left()


def test_torchruns_sigterm_ends_the_slots_alone_where_the_trainers_expect_a_restart(job: SlotJob) -> None:
    """Another node has failed: here, all slots are in place."""
    (job.folder / "expects").touch()
    start_trainers(job)
    slots = job.find_running("slot")
    os.kill(job.agent, signal.SIGTERM)
    assert job.wait_for_agent() != 0
    assert not any(map(is_alive, slots.values()))
    assert job.list_events("signal") == []
    job.wait_until_nothing_is_left()


# --- torchrun's SIGTERM, sent by this process in its place ------------------------------------------------------------


def start_slot(
    job: SlotJob, agent: int = os.getpid(), moment: str = "", number: int = 0, slots: int = 1
) -> subprocess.Popen[str]:
    """A slot of this process, which is no torchrun."""
    env = {"TMPDIR": str(job.temp), "MOMENT": moment, "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": str(slots)}
    env = make_env(RANK=str(number), TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="9", **env)
    command = [sys.executable, "slot.py", str(agent)]
    return subprocess.Popen(command, cwd=job.folder, env=env, stderr=subprocess.PIPE, text=True)


def start_two_slots(job: SlotJob) -> list[subprocess.Popen[str]]:
    before = len(job.list_events("restart")) + len(job.list_events("trainer"))
    slots = [start_slot(job, number=number, slots=2) for number in range(2)]
    wait_for(lambda: len(job.list_events("restart")) + len(job.list_events("trainer")) == before + 2)
    return slots


@pytest.fixture
def adopts_orphans() -> Iterator[None]:
    """This process adopts what has lost its parent, as the first process of a container does."""
    set_option = ctypes.CDLL(None).prctl
    set_option(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    set_option(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def other_child() -> Iterator[None]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield
        process.kill()


@pytest.mark.usefixtures("adopts_orphans", "other_child")
def test_neither_other_children_of_the_agent_nor_adopted_trainers_are_slots(job: SlotJob) -> None:
    for _ in range(2):  # from the second start on, trainer 0 is a child of this process
        slots = start_two_slots(job)
        trainers = job.find_running("trainer")
        os.kill(trainers[1], signal.SIGKILL)
        slots[1].wait(60)
        slots[0].terminate()
        assert slots[0].wait(60) == -signal.SIGTERM
        assert job.find_running("trainer") == {0: trainers[0]}
    assert job.list_events("signal") == []
    os.kill(trainers[0], signal.SIGKILL)
    os.waitpid(trainers[0], 0)


def test_slot_whose_trainer_has_finished_but_still_runs_counts_once(job: SlotJob) -> None:
    (job.folder / "linger").touch()
    slots = start_two_slots(job)
    job.tell_to_exit(0, 0)
    job.wait_for("finished")
    os.kill(job.find_running("trainer")[1], signal.SIGKILL)
    slots[1].wait(60)
    slots[0].terminate()
    assert slots[0].wait(60) == -signal.SIGTERM


def test_slot_that_gets_sigterm_after_its_neighbour_has_left_lets_its_trainer_save(job: SlotJob) -> None:
    (job.folder / "leave").touch()
    slots = start_two_slots(job)
    slots[1].send_signal(signal.SIGSTOP)
    for slot in slots:
        slot.terminate()
    assert slots[0].wait(60) == 75
    slots[1].send_signal(signal.SIGCONT)
    assert slots[1].wait(60) == 75


def test_end_after_a_restart_is_an_end(job: SlotJob) -> None:
    """A restart because a node joins does not change torchrun's number of restarts."""
    (job.folder / "leave").touch()
    slots = start_two_slots(job)
    os.kill(job.find_running("trainer")[1], signal.SIGKILL)
    slots[1].wait(60)
    slots[0].terminate()
    assert slots[0].wait(60) == -signal.SIGTERM
    slots = start_two_slots(job)
    for slot in slots:
        slot.terminate()
    assert [slot.wait(60) for slot in slots] == [75, 75]


# --- the folder and the sockets ---------------------------------------------------------------------------------------


def waits_for_lock(pid: int) -> bool:
    return any(f" -> FLOCK  ADVISORY  WRITE {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def locate_folder(job: SlotJob) -> Path:
    return job.temp / f"launcher-slots-{identify_process(os.getpid())}"


def test_slots_that_race_for_one_number_start_one_trainer(job: SlotJob) -> None:
    """The newest of them keeps it, and the others end."""
    first = start_slot(job, moment="before the trainer is started")
    job.wait_for("reached")
    others = [start_slot(job) for _ in range(3)]
    wait_for(lambda: all(waits_for_lock(slot.pid) for slot in others) or len(job.list_events("trainer")) > 1)
    (job.folder / "go").touch()
    wait_for(lambda: sum(slot.poll() is None for slot in (first, *others)) == 1)
    (last,) = [slot for slot in others if slot.returncode is None]
    assert {slot.returncode for slot in (first, *others)} == {EXIT_FAILED, None}
    job.tell_to_exit(0, 5)
    assert last.wait(60) == 5
    assert len(job.list_events("trainer")) == 1
    job.wait_until_nothing_is_left()


def test_slot_whose_folder_is_removed_while_it_waits_makes_another(job: SlotJob) -> None:
    """The last slot of an earlier start may end meanwhile."""
    folder = SlotFolder(str(locate_folder(job)))
    with folder.lock(create=True):
        slot = start_slot(job)
        wait_for(lambda: waits_for_lock(slot.pid))
        folder.remove_if_unused()
    job.wait_for("trainer")
    job.tell_to_exit(0, 0)
    assert slot.wait(60) == 0
    job.wait_until_nothing_is_left()


@pytest.mark.parametrize("kind", ["file", "folder", "socket without a listener"])
def test_what_is_in_the_way_is_replaced(job: SlotJob, kind: str) -> None:
    """Also the record of a trainer that has ended, whose pid another process has by now."""
    folder = locate_folder(job)
    folder.mkdir(0o700)
    if kind == "folder":
        (folder / "0.trainer/inner").mkdir(parents=True)
        (folder / "0.socket/inner").mkdir(parents=True)
    else:
        (folder / "0.trainer").write_text("nonsense" if kind == "file" else f"{os.getpid()}-1 0")
    if kind == "file":
        (folder / "0.socket").write_text("")
    elif kind != "folder":
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as closed:
            closed.bind(str(folder / "0.socket"))
    (folder / "other").mkdir()
    slot = start_slot(job)
    job.wait_for("trainer")
    job.tell_to_exit(0, 5)
    assert slot.wait(60) == 5
    job.wait_until_nothing_is_left()


@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_folder_that_is_not_private_is_refused(job: SlotJob, kind: str) -> None:
    folder = locate_folder(job)
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o750)
    elif kind == "link":
        (job.temp / "else").mkdir(0o700)
        folder.symlink_to("else")
    else:
        folder.write_text("")
    _, stderr = start_slot(job).communicate(timeout=60)
    assert f"{folder} is no private folder of this user" in stderr
    assert not job.list_events("trainer")


def test_ignored_signal_stays_ignored(job: SlotJob) -> None:
    """As under nohup: neither the slot nor its trainer ends by it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        slot = start_slot(job)
    finally:
        signal.signal(signal.SIGHUP, before)
    (trainer,) = job.wait_for("trainer")
    for pid in (slot.pid, trainer["pid"]):
        os.kill(pid, signal.SIGHUP)
    os.kill(slot.pid, signal.SIGUSR1)
    job.wait_for("signal", signal=signal.SIGUSR1)
    job.tell_to_exit(0, 0)
    assert slot.wait(60) == 0


def test_slot_whose_agent_has_ended_starts_nothing(job: SlotJob) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert start_slot(job, gone.pid).wait(60) == EXIT_FAILED
    assert not any(job.temp.iterdir())
