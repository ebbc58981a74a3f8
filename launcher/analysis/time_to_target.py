"""Time, samples and updates until `train.target` was reached, and the comparison of two runs by them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from launcher.run_dir.run_directory import RunDirectory
from launcher.system.formatting import format_count, format_number

__all__ = ["TimeToTarget", "compare_time_to_target", "describe_comparison"]


@dataclass(frozen=True)
class TimeToTarget:
    """Seconds of training, samples and updates until the target was reached; `value` is the metric at that time."""

    metric: str
    value: float
    seconds: float
    samples: int
    updates: int

    @classmethod
    def from_run_dir(cls, folder: Path) -> TimeToTarget | None:
        """Read it from done.json; None if the file is missing or invalid, since the metrics can still be analysed."""
        with suppress(UsageError, LookupError):
            found = (RunDirectory(folder).read_done() or {})["target"]
            return cls(*(found[key] for key in ("metric", "value", "seconds", "samples", "update")))
        return None


def compare_time_to_target(a: TimeToTarget | None, b: TimeToTarget | None) -> dict[str, Any]:
    """Compare time to target; `ratio` is throughput_ratio · samples_ratio. Empty if the runs are not comparable."""
    if a is None or b is None or a.metric != b.metric:
        return {}
    letter, soon, late = ("A", a, b) if a.seconds <= b.seconds else ("B", b, a)
    ratios = {
        "ratio": late.seconds / soon.seconds,
        "throughput_ratio": (soon.samples / soon.seconds) / (late.samples / late.seconds),
        "samples_ratio": late.samples / soon.samples,
    }
    return {"target": {"sooner": letter, **ratios, "A": asdict(a), "B": asdict(b)}}


def describe_comparison(found: Mapping[str, Any]) -> str:
    """Describe the comparison in a sentence."""
    soon, late = ("A", "B") if found["sooner"] == "A" else ("B", "A")
    first = found[soon]
    return (
        f"{soon} reached {first['metric']} {format_number(first['value'])} sooner: in {_describe_effort(first)}; {late} took "
        f"{_describe_effort(found[late])}. Speedup x{found['ratio']:.2f} = x{found['throughput_ratio']:.2f} from samples/s "
        f"times x{found['samples_ratio']:.2f} from needing fewer samples."
    )


def _describe_effort(one: Mapping[str, Any]) -> str:
    return f"{format_number(one['seconds'])} s, {format_count(one['samples'])} samples and {format_count(one['updates'])} updates"
