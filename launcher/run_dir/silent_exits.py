"""How workers ended that recorded no failure themselves: their exit codes, and the end of their logs."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from launcher.errors import EXIT_OK, EXIT_RESTART
from launcher.run_dir.failures import describe_exit, is_user_code, shorten_path
from launcher.system.redaction import mask_secrets

__all__ = ["append_exit_codes", "describe_silent_exit", "find_decisive_rank", "read_exit_codes"]

LOG_TAIL_BYTES = 64 * 1024
MAX_LINE_CHARS = 300
CRASH_DUMP_START = "Fatal Python error: "  # faulthandler's, after which the log's own lines end
CRASH_FRAME = re.compile(r'^  File "(.+)", line (\d+) in ', re.MULTILINE)


def append_exit_codes(report: Path, codes: Mapping[int, int]) -> None:
    """Append the exit codes of one failed start of the workers, by rank; without those that torchrun ended after it."""
    with suppress(OSError), report.open("a") as file:
        file.write(json.dumps(dict(codes)) + "\n")


def read_exit_codes(report: Path) -> list[dict[int, int]]:
    """Return the exit codes by rank of every failed start so far; a negative code is the number of a signal."""
    try:
        lines = report.read_text().splitlines()
    except OSError:
        return []
    starts = []
    for line in lines:
        with suppress(ValueError):  # the line is still being written
            starts.append({int(rank): int(code) for rank, code in json.loads(line).items()})
    return starts


def find_decisive_rank(codes: Mapping[int, int]) -> int | None:
    """The rank whose exit explains the failure; None if all ranks saved and asked for a restart.

    A rank that lost its peer asks for a restart, one that torchrun ended has SIGTERM, and one may abort because its
    peer has died. A rank that exits with 0 while others train is the cause if there is no other.
    """
    order = (EXIT_OK, -signal.SIGABRT, -signal.SIGTERM)
    ranks = [rank for rank, code in codes.items() if code != EXIT_RESTART]
    causes = [rank for rank in ranks if codes[rank] not in order]
    aborted = [rank for rank in ranks if codes[rank] == -signal.SIGABRT]
    left = [rank for rank in ranks if codes[rank] == EXIT_OK]
    return next(iter([*sorted(causes), *sorted(aborted), *sorted(left), *sorted(ranks)]), None)


def describe_silent_exit(codes: Mapping[int, int], get_log: Callable[[int], Path]) -> str:
    """Name the decisive rank, its exit code or signal, and the last line of its log; empty if there is none."""
    rank = find_decisive_rank(codes)
    if rank is None:
        return ""
    code, log = codes[rank], get_log(rank)
    how = describe_exit(f"rank {rank}", code)
    if code >= 0:
        how += " before training ended" if code == EXIT_OK else " without an error message"
    where, last = read_log_end(log)
    at = f" in {where}" if where else ""
    said = f'; its log ends with "{last}"' if last else ""
    return f"{how}{at}{said} (log: {log})"


def read_log_end(log: Path) -> tuple[str, str]:
    """Return where a crash happened as file:line, if the interpreter noted it, and the log's last line before that."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return "", ""
    text, found, dump = text.rpartition(CRASH_DUMP_START) if CRASH_DUMP_START in text else (text, "", "")
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    last = mask_secrets(" ".join(lines[-1].split()))[:MAX_LINE_CHARS] if lines else ""
    return (find_crash_frame(dump) if found else ""), last


def find_crash_frame(dump: str) -> str:
    """The innermost frame of the user's code in a dump of the interpreter, else the innermost frame."""
    frames = CRASH_FRAME.findall(dump)
    own = [frame for frame in frames if is_user_code(frame[0])]
    return "".join(f"{shorten_path(name)}:{line}" for name, line in (own or frames)[:1])
