"""Decide whether a command may resume an existing run: continue, start a new run, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.duration import Duration
from launcher.errors import RequestError
from launcher.manifest import named
from launcher.typed import shown

__all__ = ["Decision", "changed_keys", "decide", "is_free"]

#: Keys that do not affect the trained model and may change on resume: whole sections, and single keys.
FREE_PARTS = ("launch", "log", "plan", "run", "sink", "strategy", "sweep", "tune")
FREE_KEYS = frozenset(
    {
        "checkpoint.every",  # not checkpoint.dir: another folder has nothing to resume from
        "checkpoint.keep",
        "checkpoint.sharded",
        "data.prefetch",
        "data.workers",
        "debug",
        "elastic.balance",
        "elastic.first_s",
        "elastic.hang_s",
        "elastic.idle",
        "elastic.max_restarts",
        "elastic.max_workers",
        "elastic.min_workers",
        "format",
        "recipe.trust",  # names what may be imported; not passed to the recipe
        "resume",
        "train.activation_checkpointing",  # results are bitwise identical
        "train.device",
        "train.profile",
        "train.stop_at_target",  # only changes where training ends, like a longer train.duration
        "train.target.at_least",
        "train.target.at_most",
        "train.target.metric",
    }
)
#: Keys that the batch policy recomputes at every world size: hold keeps the global batch, however it is split.
FREE_UNDER = dict.fromkeys(("hold", "goodput"), ("batch.per_device", "batch.accumulation"))


@dataclass(frozen=True)
class Decision:
    """How to start the run.

    `fresh`: start a new run in a new directory. `must`: a checkpoint has to exist. `checkpoint`: the one named by the
    user. `changed`: keys that differ from the configuration in the run directory and may differ, as (old, new).
    """

    fresh: bool = False
    must: bool = False
    checkpoint: Path | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def decide(
    resume: str,
    folder: Path,
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    *,
    done: bool = False,
    samples_of: Callable[[str], int] | None = None,
) -> Decision:
    """Decide what `resume` means, given the flat configurations in the directory (`old`, None if new) and requested.

    The directory stores masked secrets, so they must be masked in `new` too. `done`: the run is complete, so a shorter
    duration is allowed. `samples_of` converts a duration to samples, to compare durations in different units.

    Raises:
        UsageError: a key that affects training was changed, or there is nothing to resume from.
    """
    if resume == "never" or (resume == "auto" and old is None):
        return Decision(fresh=True)
    if resume == "must" and old is None:
        raise RequestError(f"resume=must but {folder} contains no run: check run.name, or type resume=auto")
    checkpoint = None if resume in ("auto", "must") else named(resume)
    changed = changed_keys(old, new) if old is not None else {}
    refuse(
        folder, {key: values for key, values in changed.items() if not may_change(key, values, new, done, samples_of)}
    )
    return Decision(must=resume == "must", checkpoint=checkpoint, changed=changed)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, as (old, new)."""
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def may_change(
    key: str,
    values: tuple[Any, Any],
    new: Mapping[str, Any],
    done: bool,
    samples_of: Callable[[str], int] | None,
) -> bool:
    if key == "train.duration":
        return done or not shorter(*values, samples_of)
    if key == "train.validate_every":
        return new.get("schedule.decay") != "plateau"  # plateau lowers the learning rate by validation results
    allowed = () if new.get("elastic.exact") else FREE_UNDER.get(str(new.get("batch.policy")), ())
    return is_free(key) or key in allowed


def is_free(key: str) -> bool:
    """Whether a key never affects the trained model, under any batch policy."""
    return key.partition(".")[0] in FREE_PARTS or key in FREE_KEYS


def shorter(was: str, now: str, samples_of: Callable[[str], int] | None) -> bool:
    """Whether `now` is less training than `was`; durations in different units need `samples_of`."""
    if samples_of is not None:
        return samples_of(now) < samples_of(was)
    before, after = (Duration.parse(text, "train.duration") for text in (was, now))
    return before.unit == after.unit and after.value < before.value


def refuse(folder: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
    if wrong:
        listed = ", ".join(f"{key} ({shown(was)} before, {shown(now)} now)" for key, (was, now) in wrong.items())
        raise RequestError(
            f"{folder} was trained with other values of {listed}: type run.name=... for a new run, or resume=never"
        )
