"""The trainer's side of a worker slot: it outlives the slots that stand for it one after the other, but not the agent.

`TrainerLink.start` is called before anything slow is imported. A thread then ends this process as soon as the agent,
torchrun, has ended, and takes what the newest slot sends: the variables of a new start, and signals. A slot that dies
changes nothing: the trainer goes on, and the agent starts another one.

Besides its record in the folder, which the system may remove, a trainer has the claim of its slot: a name that one
socket alone can have, and only while its process runs.

A library that holds the interpreter, as the loading of torch's own does for moments, delays the thread, but not the
slot, which kills the trainer then.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

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
from launcher.system.processes import identify_process, open_pidfd

__all__ = ["TrainerLink"]

END_LIMIT_S = 0.3
TOUCH_INTERVAL_S = 3600.0


class TrainerLink:
    """A trainer's connection to its slots, and its watch on the agent."""

    def __init__(self, address: TrainerAddress) -> None:
        self._number = address.number
        self._claim = address.name_claim()
        self._claim_socket = open_slot_socket()
        self._agent = int(address.agent.partition("-")[0])
        self._folder = SlotFolder(address.folder)
        self._listener = open_slot_socket(address.listener)
        self._listener.set_inheritable(False)
        self._listener.setblocking(False)
        self._connections: dict[int, socket.socket] = {}  # by descriptor; used by the thread alone
        self._changed = threading.Condition()  # guards what follows
        self._slot: socket.socket | None = None
        self._newest: SlotStart | None = None
        self._is_taken = True
        self._told: dict[bytes, SlotMessage] = {}

    @classmethod
    def start(cls) -> TrainerLink | None:
        """Begin to listen and to watch the agent; None if no slot has started this process.

        Sets the variables of torchrun's newest start. Ends this process if the agent has ended, or if another trainer
        has its slot by now.
        """
        text = os.environ.pop(TRAINER_ENV, None)
        if text is None:
            return None
        address = TrainerAddress.from_text(text)
        link = cls(address)
        agent_end = open_pidfd(address.agent)
        if agent_end is None:
            link._end_with_agent()
        threading.Thread(target=link._watch, args=[agent_end], name="trainer-link", daemon=True).start()
        link._claim_slot()
        os.environ.update(link.take_start(None) or {})  # the first slot has sent its start before that of this process
        return link

    @property
    def agent(self) -> int:
        """The pid of the agent. This process's parent is a slot, or whatever has adopted it."""
        return self._agent

    def take_start(self, timeout_s: float | None = 0.0) -> Mapping[str, str] | None:
        """The variables of torchrun's newest start, once for each start; None if there is no new one.

        Waits for one up to `timeout_s`, with None for ever. The start of this process is in its environment.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._is_taken, timeout_s):
                return None
            self._is_taken = True
            return None if self._newest is None else self._newest.env

    def expect_restart(self, expected: bool) -> None:
        """Say whether torchrun may restart the slots of this node although none of them has failed.

        SIGTERM from torchrun then ends the slot alone. Otherwise it says that torchrun ends, and comes to this process.
        """
        self._tell_slots(SlotMessage(SlotMessage.EXPECTS_RESTART, b"%d" % expected))

    def finish(self, status: int) -> None:
        """Tell the slot with which status this process is about to exit; the last call."""
        self._tell_slots(SlotMessage(SlotMessage.STATUS, b"%d" % status))
        with suppress(OSError), self._folder.lock():
            self._folder.record_status(self._number, status)

    def _tell_slots(self, message: SlotMessage) -> None:
        """Send a message to the slot, and to each later one."""
        with self._changed:
            self._told[message.kind] = message
            if self._slot is not None:
                message.try_to_send(self._slot)

    def _claim_slot(self) -> None:
        """End this process unless it is the trainer of its slot; one that was killed may not have recorded it."""
        own = identify_process(os.getpid())
        try:
            with self._folder.lock():
                recorded = self._folder.read_trainer(self._number)
                if recorded is None and own is not None:
                    self._folder.record(self._number, own)
                elif recorded != own:
                    os._exit(EXIT_FAILED)
                self._claim_socket.bind(self._claim)
                self._claim_socket.listen()
        except OSError:  # the folder has been removed, or another trainer of this slot runs
            os._exit(EXIT_FAILED)
        os.register_at_fork(after_in_child=self._claim_socket.close)  # a data loader's worker may outlive this process

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _watch(self, agent_end: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
        while True:
            poll = select.poll()
            for descriptor in (agent_end, self._listener.fileno(), *self._connections):
                poll.register(descriptor, select.POLLIN)
            ready = [descriptor for descriptor, _ in poll.poll(1000 * TOUCH_INTERVAL_S)]
            if agent_end in ready:
                self._end_with_agent()
            if not ready:
                self._folder.touch(self._number)
            self._serve_slots()

    def _end_with_agent(self) -> NoReturn:
        """End this process at once, and remove the folder if it is the last that uses it."""
        limit = threading.Timer(END_LIMIT_S, os._exit, [EXIT_FAILED])  # a process that was stopped may hold the lock
        limit.start()
        with suppress(OSError), self._folder.lock():
            limit.cancel()
            self._folder.record_status(self._number, EXIT_FAILED)
            self._folder.remove_if_unused(ending=self._number)
        os._exit(EXIT_FAILED)

    def _serve_slots(self) -> None:
        """Accept the slots that have connected, and act on what they have sent."""
        with suppress(OSError):  # no more of them
            while True:
                connection, _ = self._listener.accept()
                self._connections[connection.fileno()] = connection
        for descriptor, connection in list(self._connections.items()):
            messages, is_open = receive_messages(connection)
            for message in messages:
                with suppress(ValueError, OSError):  # no message of ours: the watch goes on
                    self._act_on(message, connection)
                for received in message.descriptors:
                    os.close(received)
            if not is_open:
                self._forget(descriptor)

    def _act_on(self, message: SlotMessage, connection: socket.socket) -> None:
        if message.kind == SlotMessage.START:
            self._change_slot(SlotStart.decode(message.value), message.descriptors, connection)
        elif message.kind == SlotMessage.SIGNAL and connection is self._slot:
            os.kill(os.getpid(), int(message.value))

    def _change_slot(self, start: SlotStart, output: tuple[int, ...], connection: socket.socket) -> None:
        """Belong to a slot from now on, and write to its output, unless this trainer's slot was started later."""
        with self._changed:
            is_newest = self._newest is None or start.slot_started >= self._newest.slot_started
            replaced = self._slot if is_newest else connection
            if replaced is not None:
                SlotMessage(SlotMessage.REPLACED).try_to_send(replaced)
            if not is_newest:
                return
            for own, received in enumerate(output, 1):
                os.dup2(received, own)
            self._slot, self._newest, self._is_taken = connection, start, False
            for message in self._told.values():
                message.try_to_send(connection)
            self._changed.notify_all()

    def _forget(self, descriptor: int) -> None:
        """Close the connection to a slot that has ended."""
        with self._changed:
            connection = self._connections.pop(descriptor)
            if connection is self._slot:
                self._slot = None
            connection.close()
