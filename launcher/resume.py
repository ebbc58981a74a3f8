"""What an existing run folder means for a new command: go on, be done already, or refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RequestError

__all__ = ["Decision", "changed_keys", "decide"]

#: Keys that do not alter what is learned: whole sections, and single keys.
FREE_SECTIONS = ("launch", "sink", "log", "strategy", "plan", "run")
FREE_KEYS = (
    "data.workers", "data.prefetch", "checkpoint.every", "checkpoint.keep", "checkpoint.dir", "elastic.min_workers",
    "elastic.max_workers", "elastic.max_restarts", "train.profile", "train.duration", "train.device",
    "train.target.metric", "train.target.at_least", "train.target.at_most", "train.stop_at_target",
    "resume", "debug", "format", "recipe.trust", "model.init", "model.strict",
)  # fmt: skip
#: What a policy decides itself, so that the request may change: the global batch stays.
FREE_UNDER = {"hold": ("batch.per_device", "batch.accumulation")}


@dataclass(frozen=True)
class Decision:
    """`fresh`: a new run, in a new folder. `must`: there has to be a checkpoint. `checkpoint`: the one the user names.

    `changed`: the keys that differ from the folder's configuration and may, with the old and the new value.
    """

    fresh: bool = False
    must: bool = False
    checkpoint: Path | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def is_free(key: str, new: Mapping[str, Any]) -> bool:
    if key == "train.validate_every":
        return new.get("schedule.decay") != "plateau"  # its rate falls by what validations find
    allowed = FREE_UNDER.get(str(new.get("batch.policy")), ())
    return key.partition(".")[0] in FREE_SECTIONS or key in FREE_KEYS or key in allowed


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new one."""
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def decide(resume: str, folder: Path, old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Decision:
    """What `resume` asks for, given the folder's configuration (`old`, None where there is none yet).

    Raises:
        RequestError: a key that alters what is learned was changed, or there is nothing to resume from.
    """
    if resume not in ("auto", "never", "must"):
        return Decision(checkpoint=Path(resume), changed=checked(folder, old, new) if old else {})
    if old is None or resume == "never":
        if resume == "must" and old is None:
            raise RequestError(f"resume=must but {folder} holds no run: check run.name, or type resume=auto")
        return Decision(fresh=True)
    return Decision(must=resume == "must", changed=checked(folder, old, new))


def checked(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    changed = changed_keys(old, new)
    wrong = {key: values for key, values in changed.items() if not is_free(key, new)}
    if wrong:
        listed = ", ".join(f"{key} ({was} before, {now} now)" for key, (was, now) in wrong.items())
        raise RequestError(
            f"{folder} was trained with another {listed}: type run.name=… for a new run, or resume=never"
        )
    return changed
