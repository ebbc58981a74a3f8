"""What torchrun starts as a worker: a slot, which holds no torch and keeps a trainer that outlives torchrun's restarts.

A restart of the workers replaces every slot. The new slot finds the trainer of its number in the folder of its agent
(`slot_folder`), hands it the variables and the output of this start, and from then on stands for it: it passes signals
on to it, and ends as it ends. Only where no trainer runs does it start one, in a session of its own, so that torchrun's
SIGTERM and SIGKILL, which go to the slot's process group, do not reach it. The newest slot owns the trainer; an earlier
one ends. The slot opens the trainer's socket itself and lets it inherit it, so that a trainer can be found from its
first moment on.

Signals. torchrun sends SIGTERM to its workers in two cases that look the same: when it restarts them, because one has
failed or because a node wants to join, and when it has received SIGTERM itself. A user's SIGTERM to a worker means save
and leave. The slot tells them apart thus:

- The kernel names the sender. From any other process than the agent, SIGTERM is passed on to the trainer.
- From the agent it is a restart if a slot beside this one is gone without success and torchrun has restarts left, or if
  the trainer has said that it expects one (`TrainerLink.expect_restart`), because only the trainers hear of a failure
  on another node. The slot ends by the signal at once, and the trainer goes on.
  The slots record themselves in the folder for that: the agent may have other children.
- From the agent otherwise, torchrun itself is about to end: the signal is passed on as to any worker, and the trainer
  has the 30 s that torchrun gives its workers to save.
- The first slot that gets the agent's SIGTERM decides this for all slots of this start, and writes it to the folder:
  when a later one looks, the first may be gone because it has saved fast.

Every other signal is passed on (torchrun passes SIGINT and SIGHUP on only when it ends).

When the agent is gone, the trainer ends itself (`trainer_link`), and the slot kills it at the same time: a library may
hold the interpreter of the trainer, but not that of the slot.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from launcher.distributed.starter import find_agent
from launcher.errors import EXIT_FAILED
from launcher.launch.slot_folder import SlotFolder
from launcher.launch.slot_messages import (
    TRAINER_ENV,
    SlotMessage,
    SlotStart,
    TrainerAddress,
    open_slot_socket,
    receive_messages,
)
from launcher.system.processes import identify_process, open_pidfd, read_start_time
from launcher.topology import Topology, find_slot_number, select_torchrun_env

__all__ = ["run_slot"]

PASSED_SIGNALS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip


def run_slot(command: Sequence[str], agent: int | None = None) -> int:
    """Stand for the trainer of this slot until it ends; return its exit status, or die by the signal that killed it.

    `command` starts a trainer, with this process's environment and output. `agent` is torchrun's process, by default
    the nearest ancestor that has loaded torch. Nobody can know which signal killed a trainer that an earlier slot has
    started: the status is 1.

    Raises:
        UsageError: the folder of the slots is not private.
    """
    signals, mask = take_over_signals()
    agent = agent or find_agent(os.getppid())
    identity = None if agent is None else identify_process(agent)
    agent_end = None if identity is None else open_pidfd(identity)
    if agent is None or identity is None or agent_end is None:
        return EXIT_FAILED  # torchrun has ended
    number, folder = find_slot_number(), SlotFolder.of_agent(identity)
    with folder.lock(create=True):
        folder.record_slot(number, identify_process(os.getpid()) or "")
        trainer = adopt_trainer(folder, number) or start_trainer(folder, number, identity, command, mask)
    slot = WorkerSlot(folder, number, agent, trainer)
    threading.Thread(target=slot.pass_signals_on, args=[signals], daemon=True).start()
    status = slot.wait_for_trainer(agent_end)
    with suppress(FileNotFoundError), folder.lock():
        folder.remove_if_unused()
    if os.WIFSIGNALED(status):
        die_by_signal(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


def take_over_signals() -> tuple[set[int], set[int]]:
    """Block the signals that are passed on, so that a thread can wait for them, except those that are ignored.

    Returns them, and what was blocked before.
    """
    signals = {int(signum) for signum in PASSED_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN}
    mask = set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, signals)))
    for signum in (*signals, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    return signals, mask


def die_by_signal(signum: int) -> None:
    """End this process by a signal, without a core file; returns where the signal ends no process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)


@dataclass(frozen=True)
class SlotTrainer:
    """The trainer that a slot stands for: its pid and start time, a pidfd, and the connection to it."""

    identity: str
    pidfd: int
    link: socket.socket
    is_child: bool


def adopt_trainer(folder: SlotFolder, number: int) -> SlotTrainer | None:
    """Become the slot of the trainer with this number; None if none runs. The folder is locked.

    A trainer that runs but cannot be reached, because its socket was removed, is killed: two must never run.
    """
    identity = folder.read_trainer(number)
    pidfd = None if identity is None else open_pidfd(identity)
    if identity is None or pidfd is None:
        return None
    link = open_slot_socket()
    try:
        link.connect(folder.locate_socket(number))
        hand_over(link)
    except OSError:
        kill(pidfd)
        select.select([pidfd], [], [])
        return None
    return SlotTrainer(identity, pidfd, link, is_child=False)


def end_unrecorded_trainer(claim: str) -> None:
    """Kill the trainer that has the claim of a slot although its record or the whole folder has been removed."""
    with open_slot_socket() as probe:
        try:
            probe.connect(claim)
            pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            pidfd = os.pidfd_open(pid)
        except (ConnectionRefusedError, ProcessLookupError):
            return  # none runs
        if not select.select([probe], [], [], 0)[0]:  # it has the claim still, so the pidfd is not another process's
            kill(pidfd)
            select.select([pidfd], [], [])
        os.close(pidfd)


def start_trainer(folder: SlotFolder, number: int, agent: str, command: Sequence[str], mask: set[int]) -> SlotTrainer:
    """Start a trainer and become its slot; the folder is locked. The variables of this start wait in its socket."""
    folder.discard(number)
    link = open_slot_socket()
    with open_slot_socket() as listener:
        address = TrainerAddress(folder.path, number, agent, listener.fileno())
        end_unrecorded_trainer(address.name_claim())
        listener.bind(folder.locate_socket(number))
        listener.listen()
        link.connect(folder.locate_socket(number))
        hand_over(link)
        listener.set_inheritable(True)
        pid = os.posix_spawnp(
            command[0],
            list(command),
            os.environ | {TRAINER_ENV: address.to_text()},
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsid=True,
            setsigmask=mask,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
        )
    identity = f"{pid}-{read_start_time(pid)}"  # known even if it has ended: nobody has waited for it
    folder.record(number, identity)
    return SlotTrainer(identity, os.pidfd_open(pid), link, is_child=True)


def hand_over(link: socket.socket) -> None:
    """Tell a trainer the variables of this start, and give it the output of this process.

    Raises:
        OSError: the trainer has ended.
    """
    start = SlotStart(read_start_time(os.getpid()) or 0, select_torchrun_env())
    SlotMessage(SlotMessage.START, start.encode(), list_output()).send(link)


def list_output() -> tuple[int, ...]:
    """The descriptors of this process's standard output and standard error; none if one of them is closed."""
    output = (1, 2)
    try:
        for descriptor in output:
            os.fstat(descriptor)
    except OSError:
        return ()
    return output


def kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


class WorkerSlot:
    """A slot and its trainer."""

    def __init__(self, folder: SlotFolder, number: int, agent: int, trainer: SlotTrainer) -> None:
        self._folder = folder
        self._number = number
        self._agent = agent
        self._trainer = trainer
        self._expects_restart = self._is_replaced = False
        self._status: int | None = None

    def pass_signals_on(self, signals: set[int]) -> None:
        """Pass every signal on to the trainer, except for torchrun's SIGTERM at a restart. Runs in a thread."""
        while True:
            received = signal.sigwaitinfo(signals)
            is_closing = received.si_signo == signal.SIGTERM and received.si_pid == self._agent
            if is_closing and self._is_restarted():
                die_by_signal(signal.SIGTERM)
            SlotMessage(SlotMessage.SIGNAL, b"%d" % received.si_signo).try_to_send(self._trainer.link)

    def _is_restarted(self) -> bool:
        """Whether torchrun ends this slot to restart the workers, and not because it ends itself."""
        decided = None
        with suppress(OSError), self._folder.lock():
            decided = self._folder.read_decision()
            if decided is None:
                decided = self._expects_restart or self._sees_failure()
                self._folder.record_decision(decided)
        return decided or self._expects_restart

    def _sees_failure(self) -> bool:
        """Whether torchrun can restart the slots, and one of them is gone without success. The folder is locked."""
        topology = Topology.from_env() or Topology()
        in_place = self._folder.count_in_place(range(topology.local_world))
        return topology.restarts_left > 0 and in_place < topology.local_world

    def wait_for_trainer(self, agent_end: int) -> int:
        """Wait until the trainer ends, with its agent at the latest, or has another slot; return its wait status."""
        link, pidfd = self._trainer.link.fileno(), self._trainer.pidfd
        poll = select.poll()
        for descriptor in (link, pidfd, agent_end):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll()]
            if link in ready and not self._read_messages():
                poll.unregister(link)
            if pidfd in ready:
                return self._read_end()
            if self._is_replaced:
                return make_wait_status(EXIT_FAILED)
            if agent_end in ready:
                kill(pidfd)
                poll.unregister(agent_end)

    def _read_messages(self) -> bool:
        """Act on what the trainer has said; returns whether it can say more."""
        messages, is_open = receive_messages(self._trainer.link)
        for message in messages:
            if message.kind == SlotMessage.STATUS:
                self._status = int(message.value)
            elif message.kind == SlotMessage.EXPECTS_RESTART:
                self._expects_restart = message.value == b"1"
            else:
                self._is_replaced = message.kind == SlotMessage.REPLACED
        return is_open

    def _read_end(self) -> int:
        """The wait status of the trainer, which has ended."""
        if self._trainer.is_child:
            return os.waitpid(int(self._trainer.identity.partition("-")[0]), 0)[1]
        self._read_messages()
        if self._status is None:  # it may have finished before it knew this slot
            with suppress(OSError), self._folder.lock():
                self._status = self._folder.read_status(self._number, self._trainer.identity)
        return make_wait_status(EXIT_FAILED if self._status is None else self._status)


def make_wait_status(exit_status: int) -> int:
    """What `os.waitpid` returns for a process that exits with this status."""
    return (exit_status & 0xFF) << 8
