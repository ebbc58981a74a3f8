"""What an existing run folder means for a new command: go on, be done already, or refuse."""

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

#: Keys that do not alter what is learned: whole parts, and single keys.
FREE_PARTS = ("launch", "log", "plan", "run", "sink", "strategy", "sweep", "tune")
FREE_KEYS = frozenset(
    {
        "checkpoint.every",  # not checkpoint.dir: elsewhere there is nothing to go on from
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
        "recipe.trust",  # says what may be imported, is not passed to the recipe
        "resume",
        "train.activation_checkpointing",  # changes not one bit
        "train.device",
        "train.profile",
        "train.stop_at_target",  # where training ends, as a longer train.duration does
        "train.target.at_least",
        "train.target.at_most",
        "train.target.metric",
    }
)
#: What a policy works out anew at every world size: under hold the global batch stays, however it is cut up.
FREE_UNDER = dict.fromkeys(("hold", "goodput"), ("batch.per_device", "batch.accumulation"))


@dataclass(frozen=True)
class Decision:
    """`fresh`: a new run, in a new folder. `must`: there has to be a checkpoint. `checkpoint`: the one the user names.

    `changed`: the keys that differ from the folder's configuration and may, with the old and the new value.
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
    """What `resume` asks for, given the folder's configuration (`old`, None where there is none yet), both flat.

    Secrets are masked in what the folder holds, so they must be in `new`. `done`: the run is complete; then asking for
    less than it did is no change. `samples_of` makes durations in different units comparable.

    Raises:
        RequestError: a key that alters what is learned was changed, or there is nothing to resume from.
    """
    if resume == "never" or (resume == "auto" and old is None):
        return Decision(fresh=True)
    if resume == "must" and old is None:
        raise RequestError(f"resume=must but {folder} holds no run: check run.name, or type resume=auto")
    checkpoint = None if resume in ("auto", "must") else named(resume)
    changed = changed_keys(old, new) if old is not None else {}
    refuse(
        folder, {key: values for key, values in changed.items() if not may_change(key, values, new, done, samples_of)}
    )
    return Decision(must=resume == "must", checkpoint=checkpoint, changed=changed)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with the old and the new one."""
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
        return new.get("schedule.decay") != "plateau"  # its rate falls by what validations find
    allowed = () if new.get("elastic.exact") else FREE_UNDER.get(str(new.get("batch.policy")), ())
    return is_free(key) or key in allowed


def is_free(key: str) -> bool:
    """Whether a key alters nothing of what is learned, under whatever policy."""
    return key.partition(".")[0] in FREE_PARTS or key in FREE_KEYS


def shorter(was: str, now: str, samples_of: Callable[[str], int] | None) -> bool:
    """Whether `now` is less training than `was`; of two units only `samples_of` can tell."""
    if samples_of is not None:
        return samples_of(now) < samples_of(was)
    before, after = (Duration.parse(text, "train.duration") for text in (was, now))
    return before.unit == after.unit and after.value < before.value


def refuse(folder: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
    if wrong:
        listed = ", ".join(f"{key} ({shown(was)} before, {shown(now)} now)" for key, (was, now) in wrong.items())
        raise RequestError(
            f"{folder} was trained with another {listed}: type run.name=... for a new run, or resume=never"
        )
