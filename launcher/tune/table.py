"""Results of `tune -m`: one JSON document, or an 80-column table with one line per point."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import EXIT_OK
from launcher.redact import redact, redacted
from launcher.sinks.text import count, plural, rate, size, took
from launcher.tally import aligned, swept_values
from launcher.tune.document import recommended
from launcher.tune.images import ImageMemory, Peak

__all__ = ["Measured", "document", "image_memory", "table"]

WIDTH = 80
HEAD = ("", "per_device", "samples/s", "memory", "memory_max", "bottleneck")
IMAGE_SIZE = "recipe.image_size"
#: Fields that are shown in the headline if all points share them.
CONDITIONS = ("recipe", "world", "device", "precision")


@dataclass(frozen=True)
class Measured:
    """One point: its overrides (`words`) and the document of `tune`, or its exit status and error.

    `values`: its overrides by key, as plain values. `image`: height and width of its images in pixels, if known.
    """

    words: tuple[str, ...]
    values: Mapping[str, Any]
    found: Mapping[str, Any] | None = None
    status: int = EXIT_OK
    error: str | None = None
    image: tuple[int, int] | None = None


def document(points: Sequence[Measured]) -> dict[str, Any]:
    """The document that `tune -m` prints as JSON; secrets in overrides and errors are masked."""
    memory = image_memory(points)
    return {
        "points": [
            {
                "overrides": redacted(point.values),
                "found": point.found,
                "error": None if point.error is None else redact(point.error),
            }
            for point in points
        ],
        "memory": None if memory is None else memory.to_facts(),
    }


def table(points: Sequence[Measured]) -> str:
    """The table, at most 80 columns wide unless swept values are longer."""
    swept = swept_values([point.words for point in points])
    rows = [(str(number), *_cells(point)) for number, point in enumerate(points)]
    memory = image_memory(points)
    below = [*_troubles(points), *([] if memory is None else [memory.sentence()])]
    wrapped = [line for text in below for line in textwrap.wrap(redact(text), WIDTH, break_on_hyphens=False)]
    lines = [*_headline(points), *aligned(HEAD, rows, swept), *wrapped]
    return "\n".join(redact(line.rstrip()) for line in lines) + "\n"


def image_memory(points: Sequence[Measured]) -> ImageMemory | None:
    """Fit memory over all points if only the image size was swept, as other keys may change memory too."""
    keys = {key for values in swept_values([point.words for point in points]) for key in values}
    return ImageMemory.of(list(_peaks(points))) if keys == {IMAGE_SIZE} else None


def _peaks(points: Sequence[Measured]) -> Iterator[Peak]:
    for point in points:
        if point.found is not None and point.image is not None:
            height, width = point.image
            fitting = [one for one in point.found["points"] if one["memory_bytes"]]
            yield from (Peak(height, width, one["per_device"], one["memory_bytes"]) for one in fitting)


def _headline(points: Sequence[Measured]) -> Iterator[str]:
    """The conditions that all points share, and the total time."""
    found = [point.found for point in points if point.found is not None]
    if found:
        shared = [key for key in CONDITIONS if len({one[key] for one in found}) == 1]
        named = [_condition(key, found[0][key]) for key in shared]
        yield ", ".join([*named, f"{len(points)} points"]) + f"; {took(sum(one['spent_s'] for one in found))}"


def _condition(key: str, value: Any) -> str:
    return plural(value, "worker") if key == "world" else str(value)


def _cells(point: Measured) -> tuple[str, str, str, str, str]:
    """The recommended size with its speed and memory, the largest working size and the bottleneck."""
    if point.found is None:
        return (f"failed ({point.status})", "-", "-", "-", "-")
    found = point.found
    if found["recommended"] is None:
        return ("-", "-", "-", "-", "memory")
    at = recommended(found)
    if at is None or not at["samples_per_s"]:  # the largest working size may not have been timed
        speed, memory = "-", "-"
    else:
        speed, memory = rate(at["samples_per_s"]), size(at["memory_bytes"])
    return (count(found["recommended"]), speed, memory, count(found["memory_max"]), str(found["bottleneck"]))


def _troubles(points: Sequence[Measured]) -> Iterator[str]:
    """A line for each point without a recommendation."""
    for number, point in enumerate(points):
        if point.error is not None:
            yield f"point {number}: {point.error}"
        elif point.found is not None and point.found["recommended"] is None:
            yield f"point {number}: {point.found['why']}"
