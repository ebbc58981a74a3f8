"""Links in a run directory that lead out of it: a run directory may come from someone else, and they are not followed.

Otherwise a link named `metrics.jsonl` could put any file of the reader's into a report, and one named `generation`
could have another file overwritten. The run directory itself may be a link, since the user names it.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import UsageError
from launcher.system import run_files

__all__ = ["find_outward_link", "leads_out", "refuse_outward_links"]

#: What the launcher reads in a run directory, or replaces there; other entries are the user's own.
READ_ENTRIES = frozenset(
    (
        *(value for name, value in vars(run_files).items() if name.endswith("_FILE")),
        *(run_files.CHECKPOINTS_DIR, run_files.LOGS_DIR),
        *("generation", "restarts", "saved", "trained", "wandb-id", ".lock", ".gate"),
        *("rendezvous", ".store.lock", "slurm-failures"),
    )
)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether `path`, an entry of `folder`, is a link to something outside `folder`."""
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def find_outward_link(folder: Path) -> Path | None:
    """The first entry of a run directory that is read by the launcher and leads out of it; None if there is none."""
    try:
        with os.scandir(folder) as entries:
            links = sorted(entry.name for entry in entries if entry.is_symlink() and entry.name in READ_ENTRIES)
    except OSError:  # it does not exist, or its reader reports why it cannot be read
        return None
    return next((folder / name for name in links if leads_out(folder / name, folder)), None)


def refuse_outward_links(folder: Path) -> None:
    """Refuse a run directory whose files the launcher would read or write somewhere else.

    Raises:
        UsageError: names the link.
    """
    if (link := find_outward_link(folder)) is not None:
        raise UsageError(
            f"{link} is a link that leads out of the run directory, which is not followed: "
            "replace it by a copy of what it links to, or remove it"
        )
