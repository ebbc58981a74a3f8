"""What it took until `train.target` was met, and which of two runs took less."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.runfolder import RunFolder
from launcher.sinks.text import count, figure

__all__ = ["Reached", "sooner", "told"]


@dataclass(frozen=True)
class Reached:
    """What a run took until its target was met: seconds of training, samples, updates; `value` is the metric's then."""

    metric: str
    value: float
    seconds: float
    samples: int
    updates: int

    @classmethod
    def of(cls, folder: Path) -> Reached | None:
        """As done.json tells it; a broken one is no obstacle to looking at the metrics."""
        with suppress(RequestError, LookupError):
            found = (RunFolder(folder).read_done() or {})["target"]
            return cls(*(found[key] for key in ("metric", "value", "seconds", "samples", "update")))
        return None


def sooner(a: Reached | None, b: Reached | None) -> dict[str, Any]:
    """Which run met the target sooner: by its speed, by needing fewer samples, or both; the two ratios multiply."""
    if a is None or b is None or a.metric != b.metric:
        return {}
    letter, soon, late = ("A", a, b) if a.seconds <= b.seconds else ("B", b, a)
    ratios = {
        "ratio": late.seconds / soon.seconds,
        "throughput_ratio": (soon.samples / soon.seconds) / (late.samples / late.seconds),
        "samples_ratio": late.samples / soon.samples,
    }
    return {"target": {"sooner": letter, **ratios, "A": asdict(a), "B": asdict(b)}}


def told(found: Mapping[str, Any]) -> str:
    """The same in words."""
    soon, late = ("A", "B") if found["sooner"] == "A" else ("B", "A")
    first = found[soon]
    return (
        f"{soon} reached {first['metric']} {figure(first['value'])} sooner: in {_effort(first)}; {late} took "
        f"{_effort(found[late])}. That is x{found['ratio']:.2f}: x{found['throughput_ratio']:.2f} by samples/s, times "
        f"x{found['samples_ratio']:.2f} by the samples it needed."
    )


def _effort(one: Mapping[str, Any]) -> str:
    return f"{figure(one['seconds'])} s, {count(one['samples'])} samples and {count(one['updates'])} updates"
