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

from launcher.config.coercion import format_value
from launcher.config.keys import flatten
from launcher.config.schema import RunConfig
from launcher.run_dir.run_directory import RUNS_DIR, format_recipe_name
from launcher.system.atomic_files import atomic_write_text, make_durable_dir
from launcher.system.redaction import mask_nested_secrets

__all__ = [
    "CACHE_DIR",
    "CacheLookup",
    "CachedProfile",
    "MeasurementEnv",
    "all_profiles",
    "get_config_fields",
    "get_versions",
    "lookup",
    "make_cache_key",
    "matching_profiles",
    "source_hash",
    "store",
]

CACHE_DIR = RUNS_DIR / ".profiles"
CACHE_FORMAT = 1
#: Sections and keys of the configuration that determine the time and memory of an update.
CONFIG_SECTIONS = ("optimizer", "recipe", "strategy")
CONFIG_KEYS = (
    "batch.accumulation",
    "data.prefetch_factor",
    "data.source",
    "data.num_workers",
    "launch.backend",
    "train.activation_checkpointing",
    "train.clip_norm",
    "train.compile",
    "train.precision",
    "tune.max",
    "tune.sizes",
)
#: Key fields that describe the measurement request, and those that follow from the number of workers.
REQUEST_KEYS = ("tune.max", "tune.sizes", "batch.accumulation")
WORLD_FIELDS = ("world", "nodes", "local_world", "threads", "cores")
POINT_FIELDS = ("per_device", "samples_per_s", "low", "high", "memory_bytes")
MAX_SHOWN_KEYS = 3


@dataclass(frozen=True)
class MeasurementEnv:
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


def source_hash(recipe: Any) -> str:
    """Hash of the source file of the recipe's class; empty if there is no file (interactive console)."""
    with suppress(OSError, TypeError):
        return hashlib.sha256(Path(inspect.getfile(type(recipe))).read_bytes()).hexdigest()[:16]
    return ""


def get_versions() -> dict[str, str]:
    names = {"the launcher": "elastic-batch-launcher", "torch": "torch"}
    return {**{name: version(package) for name, package in names.items()}, "python": platform.python_version()}


def get_config_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of a key that come from the configuration, with secrets masked."""
    values = mask_nested_secrets(flatten(config))
    selected = {
        name: value
        for name, value in values.items()
        if name in CONFIG_KEYS or name.partition(".")[0] in CONFIG_SECTIONS
    }
    steps = 1 if config.batch.accumulation == "auto" else config.batch.accumulation
    return {name: value for name, value in selected.items() if name != "recipe.trust"} | {"batch.accumulation": steps}


def make_cache_key(config: RunConfig, env: MeasurementEnv) -> dict[str, Any]:
    """Everything a measurement depends on: a flat mapping of JSON values."""
    facts = asdict(env)
    versions = facts.pop("versions")
    return _convert_to_json({**get_config_fields(config), **facts, **_make_version_fields(versions)})


def _make_version_fields(versions: Mapping[str, str]) -> dict[str, str]:
    return {f"version of {name}": number for name, number in versions.items()}


def _convert_to_json(key: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(key))
    return values


@dataclass(frozen=True)
class CachedProfile:
    """A stored measurement. `document`: what `tune` prints as JSON. `measured`: when, in ISO 8601."""

    key: Mapping[str, Any]
    measured: str
    document: Mapping[str, Any]

    def to_text(self) -> str:
        facts = {"format": CACHE_FORMAT, "key": self.key, "measured": self.measured, "found": self.document}
        return json.dumps({**facts, "sha256": compute_key_hash(facts)}, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str) -> CachedProfile:
        """Parse and validate what `to_text` wrote.

        Raises:
            ValueError: the content was not written by `to_text`, or was altered.
        """
        facts = json.loads(text)
        if not isinstance(facts, dict) or facts.get("format") != CACHE_FORMAT:
            raise ValueError("it is not a profile of this version")
        if facts.pop("sha256", None) != compute_key_hash(facts):
            raise ValueError("its hash does not match its content")
        _check_fields(facts)
        return cls(facts["key"], facts["measured"], facts["found"])

    @property
    def formatted_time(self) -> str:
        """The time of measuring, for display: 2026-11-21 16:40 UTC."""
        return f"{datetime.fromisoformat(self.measured):%Y-%m-%d %H:%M} UTC"


def compute_key_hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_fields(facts: Mapping[str, Any]) -> None:
    """Validate the fields: a matching hash shows that nothing was lost, but not that the values make sense.

    Raises:
        ValueError: a field is missing, has the wrong type or is out of range.
    """
    try:
        datetime.fromisoformat(facts["measured"])
        document = facts["found"]
        counts = [document[name] for name in ("recommended", "world", "accumulation")]
        points = [[point[name] for name in POINT_FIELDS] for point in document["points"] if point["samples_per_s"]]
        is_valid = all(type(value) is int and value >= 1 for value in counts) and isinstance(facts["key"], dict)
        values = [value for row in points for value in row]
        is_valid = is_valid and bool(values) and all(math.isfinite(value) and value >= 0 for value in values)
    except (KeyError, TypeError) as problem:
        raise ValueError(f"a field is missing or has the wrong type: {problem}") from problem
    if not is_valid:
        raise ValueError("a value is missing or out of range")


@dataclass(frozen=True)
class CacheLookup:
    """Result of a lookup; `notes` describe files that were not used."""

    profile: CachedProfile | None = None
    notes: tuple[str, ...] = ()


def lookup(key: Mapping[str, Any], folder: Path = CACHE_DIR) -> CacheLookup:
    """Look up the profile with exactly this key; files that fail validation are skipped with a note."""
    path = make_profile_path(key, folder)
    try:
        profile = CachedProfile.from_text(path.read_text())
    except FileNotFoundError:
        return CacheLookup(notes=tuple(_describe_stale_profiles(key, folder)))
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        return CacheLookup(notes=(f"{path} cannot be trusted ({reason}): not used",))
    return CacheLookup(profile) if profile.key == key else CacheLookup(notes=(f"{path} has a different key: not used",))


def all_profiles(folder: Path = CACHE_DIR) -> Iterator[CachedProfile]:
    """All valid profiles, newest first."""
    profiles = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            profiles.append(CachedProfile.from_text(path.read_text()))
        except (OSError, ValueError):  # `lookup` reports invalid files
            continue
    return iter(sorted(profiles, key=lambda profile: profile.measured, reverse=True))


def matching_profiles(
    config: RunConfig, code: str, train_samples: int, folder: Path = CACHE_DIR
) -> CacheLookup | list[CachedProfile]:
    """The newest profile of each world size matching this configuration, all for one device; else notes on why none do.

    Fields known only on the training machine (device, shape of a sample) are taken from the newest profile.
    """
    key = _convert_to_json(
        {
            **get_config_fields(config),
            "code": code,
            "train_samples": train_samples,
            **_make_version_fields(get_versions()),
        }
    )
    key = {name: value for name, value in key.items() if name not in REQUEST_KEYS}
    stored = list(all_profiles(folder))
    matching = [profile for profile in stored if all(profile.key.get(name) == value for name, value in key.items())]
    if not matching:
        return CacheLookup(notes=tuple(_describe_mismatch(key, stored, set(key))))
    latest = matching[0].key
    shared = [name for name in latest if name not in (*REQUEST_KEYS, *WORLD_FIELDS)]
    newest: dict[Any, CachedProfile] = {}
    for profile in matching:
        if all(profile.key.get(name) == latest[name] for name in shared):
            newest.setdefault((profile.key["world"], profile.key["nodes"]), profile)
    return [newest[world_and_nodes] for world_and_nodes in sorted(newest)]


def store(profile: CachedProfile, folder: Path = CACHE_DIR) -> Path:
    """Write the profile atomically, replacing an older one with the same key.

    Raises:
        OSError: the file cannot be written.
    """
    make_durable_dir(folder)
    path = make_profile_path(profile.key, folder)
    atomic_write_text(path, profile.to_text())
    return path


def make_profile_path(key: Mapping[str, Any], folder: Path) -> Path:
    name = format_recipe_name(str(key["recipe._target_"]))
    return folder / f"{name}-w{key['world']}-{compute_key_hash(key)[:16]}.json"


def _describe_stale_profiles(key: Mapping[str, Any], folder: Path) -> Iterator[str]:
    return _describe_mismatch(key, all_profiles(folder), None)


def _describe_mismatch(
    key: Mapping[str, Any], profiles: Iterable[CachedProfile], only: Collection[str] | None
) -> Iterator[str]:
    """Explain why the closest profile of this recipe does not match the key. `only`: the fields to compare."""
    same_recipe = [profile for profile in profiles if profile.key.get("recipe._target_") == key["recipe._target_"]]

    def find_relevant(profile: CachedProfile) -> list[tuple[str, Any, Any]]:
        return [change for change in _find_differences(profile.key, key) if only is None or change[0] in only]

    if same_recipe:
        nearest = min(same_recipe, key=lambda profile: len(find_relevant(profile)))
        changes = [
            f"{name} was {_shorten_value(was)}, is now {_shorten_value(now)}"
            for name, was, now in find_relevant(nearest)
        ]
        more = f" and {len(changes) - MAX_SHOWN_KEYS} more" if len(changes) > MAX_SHOWN_KEYS else ""
        yield f"the profile of {nearest.formatted_time} is not used: {'; '.join(changes[:MAX_SHOWN_KEYS])}{more}"


def _find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, old.get(name), new.get(name)) for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _shorten_value(value: Any) -> str:
    text = format_value(value)
    return text if len(text) <= 24 else f"{text[:10]}..."
