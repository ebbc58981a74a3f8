"""Decide whether a command may resume an existing run: continue, start a new run, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.checkpoint.manifest import Manifest, resolve_checkpoint_path
from launcher.config.coercion import format_value
from launcher.config.resume_keys import may_change_on_resume
from launcher.errors import UsageError
from launcher.plan.duration import Duration

__all__ = ["ResumeDecision", "check_data_length", "decide_resume", "find_changed_keys"]

#: Keys that the batch policy recomputes at every world size: hold keeps the global batch, however it is split.
CHANGEABLE_KEYS_BY_POLICY = dict.fromkeys(("hold", "goodput"), ("batch.per_device", "batch.accumulation"))


@dataclass(frozen=True)
class ResumeDecision:
    """How to start the run.

    `is_new_run`: start a new run in a new directory. `require_checkpoint`: there has to be a checkpoint. `checkpoint`:
    the one named by the user. `changed`: keys that differ from the configuration in the run directory and may differ,
    as (old, new). `starts_over`: the run in the directory failed before its first checkpoint and is replaced.
    """

    is_new_run: bool = False
    require_checkpoint: bool = False
    checkpoint: Path | None = None
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    starts_over: bool = False


def decide_resume(
    resume: str,
    folder: Path,
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any],
    *,
    done: bool = False,
    samples_of: Callable[[str], int] | None = None,
    unlearned: Mapping[str, Any] = MappingProxyType({}),
) -> ResumeDecision:
    """Decide what `resume` means, given the flat configurations in the directory (`old`, None if new) and requested.

    The directory stores masked secrets, so they must be masked in `new` too. `done`: the run is complete, so a shorter
    duration is allowed. `samples_of` converts a duration to samples, to compare durations in different units.
    `unlearned`: keys of recipe fields that do not alter what is learned, with their defaults.

    Raises:
        UsageError: a key that affects training was changed, or there is nothing to resume from.
    """
    if resume == "never" or (resume == "auto" and old is None):
        return ResumeDecision(is_new_run=True)
    if resume == "must" and old is None:
        raise UsageError(f"resume=must but {folder} contains no run: check run.name, or type resume=auto")
    checkpoint = None if resume in ("auto", "must") else resolve_checkpoint_path(resume)
    changed = find_changed_keys({**unlearned, **old}, {**unlearned, **new}) if old is not None else {}
    learned = {key: values for key, values in changed.items() if not is_part_of(key, unlearned)}
    raise_if_changed(
        folder,
        {key: values for key, values in learned.items() if not is_change_allowed(key, values, new, done, samples_of)},
    )
    return ResumeDecision(require_checkpoint=resume == "must", checkpoint=checkpoint, changed=changed)


def find_changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, as (old, new)."""
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def is_part_of(key: str, names: Iterable[str]) -> bool:
    """Whether the key is one of the names or, for a mapping, an entry of it."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def is_change_allowed(
    key: str,
    values: tuple[Any, Any],
    new: Mapping[str, Any],
    done: bool,
    samples_of: Callable[[str], int] | None,
) -> bool:
    if key == "train.duration":
        return done or not is_shorter_training(*values, samples_of)
    if key == "train.validate_every":
        return new.get("schedule.decay") != "plateau"  # plateau lowers the learning rate by validation results
    allowed = () if new.get("elastic.exact") else CHANGEABLE_KEYS_BY_POLICY.get(str(new.get("batch.policy")), ())
    return may_change_on_resume(key) or key in allowed


def check_data_length(checkpoint: Path, manifest: Manifest, train: int) -> None:
    """Check that the training data has the length that it had when the checkpoint was saved.

    The order of the samples is a function of the length, so a run cannot be continued on data of another length.

    Raises:
        UsageError: the length differs. Checkpoints of earlier versions do not contain it.
    """
    was = manifest.facts.get("data", {}).get("train", train)
    if was != train:
        parameters = checkpoint / "model.safetensors"
        init = f" with model.init={parameters}" if parameters.is_file() else ""
        raise UsageError(
            f"the recipe's training data has {train} samples now, and had {was} when {checkpoint} was saved; the order "
            f"of the samples depends on their number: restore the data of before, or type run.name=... for a new run"
            f"{f'{init} to start from these parameters' if init else ''}"
        )


def is_shorter_training(was: str, now: str, samples_of: Callable[[str], int] | None) -> bool:
    """Whether `now` is less training than `was`; durations in different units need `samples_of`."""
    if samples_of is not None:
        return samples_of(now) < samples_of(was)
    old, new = (Duration.parse(text, "train.duration") for text in (was, now))
    return old.unit == new.unit and new.value < old.value


def raise_if_changed(folder: Path, wrong: Mapping[str, tuple[Any, Any]]) -> None:
    if wrong:
        listed = ", ".join(
            f"{key} ({format_value(was)} before, {format_value(now)} now)" for key, (was, now) in wrong.items()
        )
        raise UsageError(
            f"{folder} was trained with other values of {listed}: type run.name=... for a new run, or resume=never"
        )
