"""What the HTML report shows of a run: its metrics, events, outcome and settings, read from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.analysis.explain import explain_run
from launcher.analysis.point_metrics import PointMetrics, read_point_metrics
from launcher.analysis.run_profile import compute_profile
from launcher.errors import UsageError
from launcher.run_dir.metrics_reader import MetricValues, RunMetrics, find_runs, read_run_metrics
from launcher.system.jsonl import JsonlReader
from launcher.system.redaction import mask_secrets
from launcher.system.run_files import DONE_FILE, EVENTS_FILE, RUN_YAML_FILE

__all__ = ["RunReport", "choose_output_path", "load_reports"]


@dataclass(frozen=True)
class RunReport:
    """A run's data for the report. `settings` is its run.yaml, flattened to dotted keys."""

    history: RunMetrics
    events: tuple[Mapping[str, Any], ...]
    done: Mapping[str, Any]
    settings: Mapping[str, str]

    @property
    def rows(self) -> tuple[MetricValues, ...]:
        return self.history.rows

    @property
    def name(self) -> str:
        return mask_secrets(self.history.name)

    @cached_property
    def point_metrics(self) -> PointMetrics:
        """What ranks the run among the points of a sweep: its time, its time to the target and its best metric."""
        return read_point_metrics(self.history.folder)

    @property
    def samples(self) -> float:
        return self.rows[-1]["samples"]

    @cached_property
    def explanation(self) -> Mapping[str, Any]:
        """The JSON document of `explain`; empty without stage times."""
        try:
            return explain_run(compute_profile(self.history))
        except UsageError:
            return {}

    def get_curve(self, key: str) -> list[tuple[float, float]]:
        return [(row["samples"], row[key]) for row in self.rows if key in row]

    def list_metrics(self, prefix: str) -> list[str]:
        return sorted({key for row in self.rows for key in row if key.startswith(prefix)})


def load_reports(names: Sequence[str]) -> Iterator[RunReport]:
    """Load the runs named on the command line; a folder of runs stands for all runs in it.

    Raises:
        UsageError: a name does not match any run.
    """
    for name in names:
        for folder in find_runs(name):
            yield RunReport(
                read_run_metrics(str(folder)),
                tuple(_read_events(folder)),
                _read_done_file(folder),
                _read_settings(folder),
            )


def choose_output_path(names: Sequence[str]) -> Path:
    """Default path of the page: in the run directory, or in the common parent directory of several runs."""
    folders = [folder for name in names for folder in find_runs(name)]
    if len(folders) == 1:
        return folders[0] / "report.html"
    parents = {folder.parent for folder in folders}
    if len(parents) > 1:
        raise UsageError(f"report: {len(folders)} runs are in different folders: add -o FILE.html")
    return parents.pop() / "report.html"


# --- files beside metrics.jsonl; any of them may be missing or broken --------------------------------------------


def _read_events(folder: Path) -> Iterator[Mapping[str, Any]]:
    with suppress(OSError):
        yield from JsonlReader(folder / EVENTS_FILE)


def _read_done_file(folder: Path) -> Mapping[str, Any]:
    try:
        done = json.loads(_read_text_or_empty(folder / DONE_FILE))
    except ValueError:
        return {}
    return done if isinstance(done, dict) and isinstance(done.get("seconds"), int | float) else {}


def _read_settings(folder: Path) -> Mapping[str, str]:
    import yaml

    try:
        read = yaml.safe_load(_read_text_or_empty(folder / RUN_YAML_FILE))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return dict(_flatten_settings(read, "", 0)) if isinstance(read, dict) else {}


def _flatten_settings(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and depth < 4:
        for key, item in list(value.items())[:200]:
            yield from _flatten_settings(item, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        yield name, " ".join(str(item) for item in value[:20] if not isinstance(item, dict | list))
    elif not isinstance(value, dict):
        yield name, "null" if value is None else str(value)


def _read_text_or_empty(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
