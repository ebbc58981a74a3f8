"""The failed starts of a job's workers as the driver sees them: how each ended, and whether to start again."""

from __future__ import annotations

import signal
from pathlib import Path

from launcher.run_dir import failures
from launcher.run_dir.run_directory import RunDirectory
from launcher.run_dir.silent_exits import describe_silent_exit, find_decisive_rank, read_exit_codes

__all__ = ["FailedStarts"]

#: Signals that say nothing about the recipe: out of memory, a lost machine, a user.
KILLS_FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM})


class FailedStarts:
    """Follows the failure records and the exit codes that the torchrun agent writes.

    `count` is the number of failed starts so far. `last_exit` describes how the last start ended if its ranks recorded
    no cause, e.g. `rank 1 exited with code 3`; empty if all ranks saved and asked for a restart. `repeated` is the
    generation of the first of two equal failures, once `is_repeated` has been true.
    """

    def __init__(self, run_dir: RunDirectory, first_generation: int, exit_codes: Path) -> None:
        self._run_dir = run_dir
        self._first_generation = first_generation
        self._exit_codes = exit_codes
        self.count = 0
        self._exits: dict[int, dict[int, int]] = {}  # exit codes by rank, by generation
        self.last_exit = ""
        self.repeated: int | None = None

    def observe(self, generation: int) -> None:
        """Take the exit codes of a start that has ended since the last call; `generation` is the current one."""
        starts = read_exit_codes(self._exit_codes)
        if len(starts) == self.count:
            return
        self.count, codes = len(starts), starts[-1]
        self.last_exit = describe_silent_exit(codes, lambda rank: self._run_dir.get_log_path(rank, generation))
        self._exits[generation] = codes

    def is_repeated(self, generation: int) -> bool:
        """Whether the last two starts failed in the same way before any update: a third one would fail as well."""
        last = max(generation if self._find_signatures(generation) else generation - 1, self._first_generation)
        same = last > self._first_generation and self._find_signatures(last) & self._find_signatures(last - 1)
        if self.repeated is None and same and self._run_dir.read_trained_generation() < last - 1:
            self.repeated = last - 1
        return self.repeated is not None

    def _find_signatures(self, generation: int) -> set[tuple[object, ...]]:
        """What failed in one generation: type, place and message of each cause; without one, rank and exit code.

        Empty until its exit codes are known, and if a rank was killed from outside: then the errors of the others, of
        which torch has many, may be its consequence. The exit codes leave out the ranks that torchrun itself ended.
        """
        codes = self._exits.get(generation, {})
        rank = find_decisive_rank(codes)
        if not codes or not KILLS_FROM_OUTSIDE.isdisjoint(codes.values()):
            return set()
        causes: set[tuple[object, ...]] = {
            failure.signature
            for failure in failures.read_failures(self._run_dir.logs, generation)
            if failure.type != failures.HANG and not failures.is_peer_failure(failure.message)
        }
        return {(rank, codes[rank])} if not causes and rank is not None else causes
