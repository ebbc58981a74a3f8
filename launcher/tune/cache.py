"""Cache of measurements in runs/.profiles: one file per key, and the key holds everything the values depend on.

A file is used only if every field of its key matches. Otherwise a note reports which fields differ. A file that was
truncated, edited or written by another program is reported, and the measurement is repeated.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import platform
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher.durable import private_folder, write_whole
from launcher.keys import flat
from launcher.redact import redacted
from launcher.runfolder import RUNS, recipe_name
from launcher.settings import Run
from launcher.typed import shown

__all__ = [
    "FOLDER",
    "Looked",
    "Place",
    "Profile",
    "code_of",
    "configured",
    "family",
    "keep",
    "kept",
    "key_of",
    "look",
    "versions",
]

FOLDER = RUNS / ".profiles"
FORMAT = 1
#: Sections and keys of the configuration that determine the time and memory of an update.
PARTS = ("optimizer", "recipe", "strategy")
KEYS = (
    "batch.accumulation",
    "data.prefetch",
    "data.source",
    "data.workers",
    "launch.backend",
    "train.activation_checkpointing",
    "train.clip_norm",
    "train.compile",
    "train.precision",
    "tune.max",
    "tune.sizes",
)
#: Key fields that describe the measurement request, and those that follow from the number of workers.
ASKED = ("tune.max", "tune.sizes", "batch.accumulation")
WORLDS = ("world", "nodes", "local_world", "threads", "cores")
POINT = ("per_device", "samples_per_s", "low", "high", "memory_bytes")
MOST_TOLD = 3


@dataclass(frozen=True)
class Place:
    """What a measurement depends on besides the configuration: machine, program versions, data.

    `code`: a hash of the recipe's source. `shape`: the shape of a sample. `cores`: CPU cores available on this machine.
    """

    world: int
    nodes: int
    local_world: int
    device: str
    cores: int
    threads: int
    code: str
    shape: Any
    train_samples: int
    versions: Mapping[str, str]


def code_of(recipe: Any) -> str:
    """Hash of the source file of the recipe's class; empty if there is no file (interactive console)."""
    with suppress(OSError, TypeError):
        return hashlib.sha256(Path(inspect.getfile(type(recipe))).read_bytes()).hexdigest()[:16]
    return ""


def versions() -> dict[str, str]:
    names = {"the launcher": "elastic-batch-launcher", "torch": "torch"}
    return {**{name: version(found) for name, found in names.items()}, "python": platform.python_version()}


def configured(run: Run) -> dict[str, Any]:
    """The fields of a key that come from the configuration, with secrets masked."""
    values = redacted(flat(run))
    named = {name: value for name, value in values.items() if name in KEYS or name.partition(".")[0] in PARTS}
    steps = 1 if run.batch.accumulation == "auto" else run.batch.accumulation
    return {name: value for name, value in named.items() if name != "recipe.trust"} | {"batch.accumulation": steps}


def key_of(run: Run, place: Place) -> dict[str, Any]:
    """Everything a measurement depends on: a flat mapping of JSON values."""
    facts = asdict(place)
    numbers = facts.pop("versions")
    return _as_json({**configured(run), **facts, **_named(numbers)})


def _named(numbers: Mapping[str, str]) -> dict[str, str]:
    return {f"version of {name}": number for name, number in numbers.items()}


def _as_json(key: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(key))
    return values


@dataclass(frozen=True)
class Profile:
    """A stored measurement. `found`: the document that `tune` prints. `measured`: when, in ISO 8601."""

    key: Mapping[str, Any]
    measured: str
    found: Mapping[str, Any]

    def text(self) -> str:
        facts = {"format": FORMAT, "key": self.key, "measured": self.measured, "found": self.found}
        return json.dumps({**facts, "sha256": digest(facts)}, indent=1) + "\n"

    @classmethod
    def of_text(cls, text: str) -> Profile:
        """Parse and validate what `text` wrote.

        Raises:
            ValueError: the content was not written by `text`, or was altered.
        """
        facts = json.loads(text)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError("it is not a profile of this version")
        if facts.pop("sha256", None) != digest(facts):
            raise ValueError("its hash does not match its content")
        _check(facts)
        return cls(facts["key"], facts["measured"], facts["found"])

    @property
    def day(self) -> str:
        """The time of measuring, for display: 2026-11-21 16:40 UTC."""
        return f"{datetime.fromisoformat(self.measured):%Y-%m-%d %H:%M} UTC"


def digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check(facts: Mapping[str, Any]) -> None:
    """Validate the fields: a matching hash shows that nothing was lost, but not that the values make sense.

    Raises:
        ValueError: a field is missing, has the wrong type or is out of range.
    """
    try:
        datetime.fromisoformat(facts["measured"])
        whole = [facts["found"][name] for name in ("recommended", "world", "accumulation")]
        points = [[point[name] for name in POINT] for point in facts["found"]["points"] if point["samples_per_s"]]
        sound = all(type(value) is int and value >= 1 for value in whole) and isinstance(facts["key"], dict)
        sound = sound and bool(points) and all(math.isfinite(value) and value >= 0 for row in points for value in row)
    except (KeyError, TypeError) as problem:
        raise ValueError(f"a field is missing or has the wrong type: {problem}") from problem
    if not sound:
        raise ValueError("a value is missing or out of range")


@dataclass(frozen=True)
class Looked:
    """Result of a lookup; `said` holds notes about files that were not used."""

    profile: Profile | None = None
    said: tuple[str, ...] = ()


def look(key: Mapping[str, Any], folder: Path = FOLDER) -> Looked:
    """Look up the profile with exactly this key; files that fail validation are skipped with a note."""
    path = path_of(key, folder)
    try:
        profile = Profile.of_text(path.read_text())
    except FileNotFoundError:
        return Looked(said=tuple(_stale(key, folder)))
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or problem
        return Looked(said=(f"{path} cannot be trusted ({why}): not used",))
    return Looked(profile) if profile.key == key else Looked(said=(f"{path} has a different key: not used",))


def kept(folder: Path = FOLDER) -> Iterator[Profile]:
    """All valid profiles, newest first."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            found.append(Profile.of_text(path.read_text()))
        except (OSError, ValueError):  # `look` reports invalid files
            continue
    return iter(sorted(found, key=lambda profile: profile.measured, reverse=True))


def family(run: Run, code: str, train_samples: int, folder: Path = FOLDER) -> Looked | list[Profile]:
    """The newest profile of each world size matching this configuration, all for one device; else notes on why none do.

    Fields known only on the training machine (device, shape of a sample) are taken from the newest profile.
    """
    key = _as_json({**configured(run), "code": code, "train_samples": train_samples, **_named(versions())})
    key = {name: value for name, value in key.items() if name not in ASKED}
    there = list(kept(folder))
    ours = [one for one in there if all(one.key.get(name) == value for name, value in key.items())]
    if not ours:
        return Looked(said=tuple(_told(key, there, set(key))))
    fixed = [name for name in ours[0].key if name not in (*ASKED, *WORLDS)]
    alike = [one for one in ours if all(one.key.get(name) == ours[0].key[name] for name in fixed)]
    newest: dict[Any, Profile] = {}
    for one in alike:
        newest.setdefault((one.key["world"], one.key["nodes"]), one)
    return [newest[where] for where in sorted(newest)]


def keep(profile: Profile, folder: Path = FOLDER) -> Path:
    """Write the profile atomically, replacing an older one with the same key.

    Raises:
        OSError: the file cannot be written.
    """
    private_folder(folder)
    path = path_of(profile.key, folder)
    write_whole(path, profile.text())
    return path


def path_of(key: Mapping[str, Any], folder: Path) -> Path:
    name = recipe_name(str(key["recipe._target_"]))
    return folder / f"{name}-w{key['world']}-{digest(key)[:16]}.json"


def _stale(key: Mapping[str, Any], folder: Path) -> Iterator[str]:
    return _told(key, kept(folder), None)


def _told(key: Mapping[str, Any], there: Iterable[Profile], only: Collection[str] | None) -> Iterator[str]:
    """Explain why the closest profile of this recipe does not match the key. `only`: the fields to compare."""
    same = [one for one in there if one.key.get("recipe._target_") == key["recipe._target_"]]

    def differing(one: Profile) -> list[tuple[str, Any, Any]]:
        return [each for each in _differing(one.key, key) if only is None or each[0] in only]

    if same:
        nearest = min(same, key=lambda one: len(differing(one)))
        told = [f"{name} was {_short(was)}, is now {_short(now)}" for name, was, now in differing(nearest)]
        more = f" and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
        yield f"the profile of {nearest.day} is not used: {'; '.join(told[:MOST_TOLD])}{more}"


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 24 else f"{text[:10]}..."
