"""A sweep's folder, its points and the table at its end. What runs the points is Hydra's, in `launcher.config`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.checks import RUN_NAME
from launcher.errors import EXIT_OK, RequestError
from launcher.redact import redact, redacted
from launcher.settings import Run, RunSettings

__all__ = ["Outcome", "folder_of", "placed", "seal", "table", "worst"]


@dataclass(frozen=True)
class Outcome:
    """How one point ended: its number, what it changed, its exit status."""

    number: int
    overrides: tuple[str, ...]
    status: int


def folder_of(run: RunSettings, now: float | None = None) -> Path:
    """The sweep's folder: run.dir, runs/<run.name>, or a new one named by the time (seconds since 1970)."""
    if run.dir is not None:
        return Path(run.dir)
    if run.name is not None:
        if not RUN_NAME.fullmatch(run.name):
            raise RequestError(f"run.name={run.name}: type up to 64 letters, digits, '.', '_' and '-'")
        return Path("runs") / run.name
    named = Path("runs") / time.strftime("sweep-%Y%m%d-%H%M%S", time.localtime(now))
    taken = [named, *(named.with_name(f"{named.name}-{count}") for count in range(2, 100))]
    return next(folder for folder in taken if not folder.exists())


def placed(run: Run, folder: Path, number: int | str) -> Run:
    """The point `number` of a sweep: a whole run folder of its own inside the sweep's."""
    name = f"{folder.name}-{number}"
    return replace(run, run=RunSettings(name=name if RUN_NAME.fullmatch(name) else None, dir=str(folder / str(number))))


def seal(file: Path) -> None:
    """Masks the secrets in the file that Hydra wrote about the sweep, and keeps it to the user."""
    if not file.is_file() or file.is_symlink():
        return
    masked = yaml.safe_dump(redacted(yaml.safe_load(file.read_text(encoding="utf-8"))), sort_keys=False)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(beside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as sealed:
        sealed.write(masked)
    beside.replace(file)


def worst(outcomes: Sequence[Outcome]) -> int:
    return max((outcome.status for outcome in outcomes), default=EXIT_OK)


def table(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """A line a point: what it changed that others did not, and how it ended."""
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    lines = [f"sweep {folder}"]
    for outcome in outcomes:
        own = " ".join(override for override in outcome.overrides if override not in common)
        ended = "finished" if outcome.status == EXIT_OK else f"failed ({outcome.status})"
        lines.append(redact(f"  {outcome.number:>3}  {ended:<12}  {own}").rstrip())
    return "\n".join(lines)
