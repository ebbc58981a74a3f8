"""Results of `tune -m`: one JSON document, or an 80-column table with one line per point."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import EXIT_OK
from launcher.sweep.results_table import align_table, find_swept_values
from launcher.system.formatting import format_bytes, format_count, format_duration, format_plural, format_rate
from launcher.system.redaction import mask_nested_secrets, mask_secrets
from launcher.tune.report.document import find_recommended_point
from launcher.tune.report.image_memory import ImageMemoryModel, PeakMemory

__all__ = ["MeasuredPoint", "fit_image_memory", "format_points_table", "make_points_document"]

MAX_TUNE_TABLE_WIDTH = 80
TABLE_HEADS = ("", "per_device", "samples/s", "memory", "memory_max", "bottleneck")
IMAGE_SIZE_KEY = "recipe.image_size"
#: Fields that are shown in the headline if all points share them.
CONDITION_KEYS = ("recipe", "world", "device", "precision")


@dataclass(frozen=True)
class MeasuredPoint:
    """One point: its `overrides` and the document of `tune`, or its exit status and error.

    `values`: the overrides by key, as plain values. `image`: height and width of its images in pixels, if known.
    """

    overrides: tuple[str, ...]
    values: Mapping[str, Any]
    document: Mapping[str, Any] | None = None
    status: int = EXIT_OK
    error: str | None = None
    image: tuple[int, int] | None = None


def make_points_document(points: Sequence[MeasuredPoint]) -> dict[str, Any]:
    """The document that `tune -m` prints as JSON; secrets in overrides and errors are masked."""
    memory = fit_image_memory(points)
    return {
        "points": [
            {
                "overrides": mask_nested_secrets(point.values),
                "found": point.document,
                "error": None if point.error is None else mask_secrets(point.error),
            }
            for point in points
        ],
        "memory": None if memory is None else memory.to_facts(),
    }


def format_points_table(points: Sequence[MeasuredPoint]) -> str:
    """The table, at most 80 columns wide unless swept values are longer."""
    swept = find_swept_values([point.overrides for point in points])
    rows = [(str(number), *_format_point_cells(point)) for number, point in enumerate(points)]
    memory = fit_image_memory(points)
    notes = [*_describe_failures(points), *([] if memory is None else [memory.describe()])]
    wrapped = [
        line
        for text in notes
        for line in textwrap.wrap(mask_secrets(text), MAX_TUNE_TABLE_WIDTH, break_on_hyphens=False)
    ]
    lines = [*_format_headline(points), *align_table(TABLE_HEADS, rows, swept), *wrapped]
    return "\n".join(mask_secrets(line.rstrip()) for line in lines) + "\n"


def fit_image_memory(points: Sequence[MeasuredPoint]) -> ImageMemoryModel | None:
    """Fit memory over all points if only the image size was swept, as other keys may change memory too."""
    keys = {key for values in find_swept_values([point.overrides for point in points]) for key in values}
    return ImageMemoryModel.from_peaks(list(_iter_peaks(points))) if keys == {IMAGE_SIZE_KEY} else None


def _iter_peaks(points: Sequence[MeasuredPoint]) -> Iterator[PeakMemory]:
    for point in points:
        if point.document is not None and point.image is not None:
            height, width = point.image
            for size in point.document["points"]:
                if size["memory_bytes"]:
                    yield PeakMemory(height, width, size["per_device"], size["memory_bytes"])


def _format_headline(points: Sequence[MeasuredPoint]) -> Iterator[str]:
    """The conditions that all points share, and the total time."""
    documents = [point.document for point in points if point.document is not None]
    if documents:
        shared = [key for key in CONDITION_KEYS if len({document[key] for document in documents}) == 1]
        conditions = [_format_condition(key, documents[0][key]) for key in shared]
        spent_s = sum(document["spent_s"] for document in documents)
        yield ", ".join([*conditions, f"{len(points)} points"]) + f"; {format_duration(spent_s)}"


def _format_condition(key: str, value: Any) -> str:
    return format_plural(value, "worker") if key == "world" else str(value)


def _format_point_cells(point: MeasuredPoint) -> tuple[str, str, str, str, str]:
    """The recommended size with its speed and memory, the largest working size and the bottleneck."""
    if point.document is None:
        return (f"failed ({point.status})", "-", "-", "-", "-")
    document = point.document
    if document["recommended"] is None:
        return ("-", "-", "-", "-", "memory")
    size = find_recommended_point(document)
    speed, memory = "-", "-"
    if size is not None and size["samples_per_s"]:  # the largest working size may not have been timed
        speed, memory = format_rate(size["samples_per_s"]), format_bytes(size["memory_bytes"])
    return (
        format_count(document["recommended"]),
        speed,
        memory,
        format_count(document["memory_max"]),
        str(document["bottleneck"]),
    )


def _describe_failures(points: Sequence[MeasuredPoint]) -> Iterator[str]:
    """A line for each point without a recommendation."""
    for number, point in enumerate(points):
        if point.error is not None:
            yield f"point {number}: {point.error}"
        elif point.document is not None and point.document["recommended"] is None:
            yield f"point {number}: {point.document['why']}"
