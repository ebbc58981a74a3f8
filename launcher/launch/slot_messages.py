"""What a worker slot and its trainer tell each other: one message a packet, its kind, a space and its value."""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["TRAINER_ENV", "SlotMessage", "SlotStart", "TrainerAddress", "open_slot_socket", "receive_messages"]

#: Tells a trainer where its slots find it.
TRAINER_ENV = "LAUNCHER_TRAINER"
MAX_MESSAGE_BYTES = 200_000
RIGHTS_BYTES = socket.CMSG_SPACE(2 * array("i").itemsize)
RECEIVE_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


@dataclass(frozen=True)
class TrainerAddress:
    """Where the slots of a trainer find it: by folder and number; its agent, and its open socket."""

    folder: str
    number: int
    agent: str
    listener: int

    def name_claim(self) -> str:
        """The name of the socket that only the trainer of this slot has; it is in no folder."""
        namespace = os.stat("/proc/self/ns/pid").st_ino  # containers may share a network, but not their pids
        return f"\0launcher-slot-{namespace}-{self.agent}-{self.number}"

    def to_text(self) -> str:
        return f"{self.number}:{self.agent}:{self.listener}:{self.folder}"

    @classmethod
    def from_text(cls, text: str) -> TrainerAddress:
        number, agent, listener, folder = text.split(":", 3)
        return cls(folder, int(number), agent, int(listener))


@dataclass(frozen=True)
class SlotStart:
    """A start of torchrun's: its variables, and when the slot that tells it was started, in clock ticks since boot."""

    slot_started: int
    env: Mapping[str, str]

    def encode(self) -> bytes:
        return os.fsencode(
            "\0".join([str(self.slot_started), *(f"{name}={value}" for name, value in self.env.items())])
        )

    @classmethod
    def decode(cls, value: bytes) -> SlotStart:
        started, *variables = os.fsdecode(value).split("\0")
        return cls(int(started), dict(variable.split("=", 1) for variable in variables))


@dataclass(frozen=True)
class SlotMessage:
    """A message of a slot to its trainer, START or SIGNAL (its number), or of a trainer to its slot, the others.

    STATUS is an exit status, EXPECTS_RESTART 0 or 1; after REPLACED, another slot has the trainer. The `descriptors` of
    START are the slot's standard output and standard error, or none if one of them is closed.
    """

    START, SIGNAL, STATUS, EXPECTS_RESTART, REPLACED = b"start", b"signal", b"status", b"restart", b"replaced"

    kind: bytes
    value: bytes = b""
    descriptors: tuple[int, ...] = ()

    def send(self, link: socket.socket) -> None:
        """
        Raises:
            OSError: the other side has ended, or is stuck.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", self.descriptors))] if self.descriptors else []
        link.sendmsg([self.kind + b" " + self.value], rights, socket.MSG_DONTWAIT)  # `send_fds` ignores its flags

    def try_to_send(self, link: socket.socket) -> None:
        """Send it, unless the other side has ended or is stuck."""
        with suppress(OSError):
            self.send(link)


def open_slot_socket(descriptor: int | None = None) -> socket.socket:
    """A socket between slots and trainers, which keeps messages apart."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=descriptor)


def receive_messages(link: socket.socket) -> tuple[list[SlotMessage], bool]:
    """The messages that have arrived, and whether more can come."""
    found: list[SlotMessage] = []
    while True:
        try:
            packet, rights, _, _ = link.recvmsg(MAX_MESSAGE_BYTES, RIGHTS_BYTES, RECEIVE_FLAGS)
        except BlockingIOError:
            return found, True
        except OSError:
            return found, False
        if not packet:
            return found, False
        kind, _, value = packet.partition(b" ")
        descriptors = tuple(descriptor for *_, data in rights for descriptor in array("i", data))
        found.append(SlotMessage(kind, value, descriptors))
