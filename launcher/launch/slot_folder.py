"""The private folder in which the worker slots of one agent find their trainers.

The folder is named by the agent's pid and start time. Slot N has three files there: `N.socket`, on which its trainer
listens; `N.trainer`, with the trainer's pid and start time and, once it has finished, its exit status; and `N.slot`,
with the pid and start time of the slot itself. `closing` says whether the slots that torchrun ends now are restarted.
The files are read and changed under a lock on the folder itself, which the kernel releases when its holder ends.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from launcher.errors import UsageError
from launcher.system.processes import is_same_process

__all__ = ["SlotFolder"]

#: A socket's path has 107 bytes at most.
MAX_FOLDER_BYTES = 92
RECORD_SUFFIX = ".trainer"
RESTART, END = "restart", "end"


@dataclass(frozen=True)
class SlotFolder:
    """The folder at `path`. The lock is held while the other methods are called."""

    path: str

    @classmethod
    def of_agent(cls, identity: str) -> SlotFolder:
        """In TMPDIR, or in /tmp where the path of a socket in it would be longer than Linux allows."""
        name = f"launcher-slots-{identity}"
        path = os.path.join(os.path.abspath(os.environ.get("TMPDIR") or "/tmp"), name)
        return cls(path if len(os.fsencode(path)) <= MAX_FOLDER_BYTES else f"/tmp/{name}")

    @contextmanager
    def lock(self, *, create: bool = False) -> Iterator[None]:
        """Hold the lock in this block.

        Raises:
            FileNotFoundError: the folder has been removed, and `create` does not ask for a new one.
            UsageError: the folder belongs to another user, or others may use it.
        """
        while True:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(self.path, 0o700)
            try:
                folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:
                if create:
                    continue  # another slot has just removed it
                raise
            except NotADirectoryError:  # a link, too
                raise UsageError(describe_foreign_folder(self.path)) from None
            try:
                info = os.fstat(folder)
                if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
                    raise UsageError(describe_foreign_folder(self.path))
                fcntl.flock(folder, fcntl.LOCK_EX)
                if self._is_at(folder):
                    yield
                    return
            finally:
                fcntl.flock(folder, fcntl.LOCK_UN)  # a process that was forked in the block still has the folder open
                os.close(folder)

    def _is_at(self, folder: int) -> bool:
        """Whether the open folder is still the one at the path."""
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(folder))
        except FileNotFoundError:
            return False

    def locate_socket(self, number: int) -> str:
        return f"{self.path}/{number}.socket"

    def locate_record(self, number: int) -> str:
        return f"{self.path}/{number}{RECORD_SUFFIX}"

    def locate_slot(self, number: int) -> str:
        return f"{self.path}/{number}.slot"

    def locate_decision(self) -> str:
        return f"{self.path}/closing"

    def discard(self, number: int) -> None:
        """Remove what a slot's earlier trainer has left, or whatever else is there by its name."""
        remove_path(self.locate_socket(number))
        remove_path(self.locate_record(number))

    def record_slot(self, number: int, slot: str) -> None:
        """Record a new slot by its pid and start time; what an earlier start of the slots has decided is over."""
        remove_path(self.locate_decision())
        remove_path(self.locate_slot(number))
        with open(self.locate_slot(number), "x") as file:
            file.write(slot)

    def record_decision(self, is_restart: bool) -> None:
        """Record for the other slots of this start whether torchrun restarts them, or ends itself."""
        with open(self.locate_decision(), "x") as file:
            file.write(RESTART if is_restart else END)

    def read_decision(self) -> bool | None:
        """Whether torchrun restarts the slots; None if no slot of this start has decided that."""
        words = read_words(self.locate_decision())
        return words == [RESTART] if words in ([RESTART], [END]) else None

    def record(self, number: int, trainer: str) -> None:
        """Record the trainer of a slot: its pid and start time."""
        with open(self.locate_record(number), "x") as file:
            file.write(trainer)

    def record_status(self, number: int, status: int) -> None:
        """Record that the trainer of a slot ends, and how."""
        with open(self.locate_record(number), "a") as file:
            file.write(f" {status}")

    def touch(self, number: int) -> None:
        """Mark a slot's files as used: what is old in /tmp may be removed by the system. Needs no lock."""
        for path in (self.locate_socket(number), self.locate_record(number), self.locate_slot(number)):
            with suppress(OSError):
                os.utime(path)

    def read_trainer(self, number: int) -> str | None:
        """The pid and start time of the slot's trainer, which may have ended; None if it has had none."""
        words = read_words(self.locate_record(number))
        return words[0] if words else None

    def read_status(self, number: int, trainer: str) -> int | None:
        """The exit status that this trainer has recorded; None if it has not finished, e.g. because it was killed."""
        words = read_words(self.locate_record(number))
        return int(words[1]) if words[:1] == [trainer] and words[1:] and words[1].isdecimal() else None

    def list_trainers(self) -> dict[int, str]:
        """The running trainers by the numbers of their slots, each as pid and start time."""
        names = [name.removesuffix(RECORD_SUFFIX) for name in os.listdir(self.path) if name.endswith(RECORD_SUFFIX)]
        found = {int(name): self.read_trainer(int(name)) for name in names if name.isdecimal()}
        return {number: trainer for number, trainer in found.items() if trainer and is_same_process(trainer)}

    def count_in_place(self, numbers: range) -> int:
        """How many of these slots run, or have a trainer that has finished with status 0."""
        return sum(
            any(map(is_same_process, read_words(self.locate_slot(number))))
            or read_words(self.locate_record(number))[1:2] == ["0"]
            for number in numbers
        )

    def remove_if_unused(self, ending: int | None = None) -> None:
        """Remove the folder unless a trainer other than that of the slot `ending` runs and has not finished."""
        others = [
            number
            for number, trainer in self.list_trainers().items()
            if number != ending and (ending is None or self.read_status(number, trainer) is None)
        ]
        if not others:
            remove_folder(self.path)


def describe_foreign_folder(path: str) -> str:
    return f"{path} is no private folder of this user: remove it, or set TMPDIR to a folder where others cannot write"


def remove_folder(path: str) -> None:
    try:
        for name in os.listdir(path):
            os.unlink(f"{path}/{name}")
        os.rmdir(path)
    except OSError:  # there is a folder in it
        import shutil

        shutil.rmtree(path, ignore_errors=True)


def remove_path(path: str) -> None:
    """Remove whatever is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:  # a folder
        import shutil

        shutil.rmtree(path)


def read_words(path: str) -> list[str]:
    """The words of a short file; none if it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read(200).split()
    except OSError:
        return []
