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
            target = (RunDirectory(folder).read_done() or {})["target"]
            return cls(*(target[key] for key in ("metric", "value", "seconds", "samples", "update")))
        return None


def compare_time_to_target(a: TimeToTarget | None, b: TimeToTarget | None) -> dict[str, Any]:
    """Compare time to target; `ratio` is throughput_ratio · samples_ratio. Empty if the runs are not comparable."""
    if a is None or b is None or a.metric != b.metric:
        return {}
    letter, sooner, later = ("A", a, b) if a.seconds <= b.seconds else ("B", b, a)
    ratios = {
        "ratio": later.seconds / sooner.seconds,
        "throughput_ratio": (sooner.samples / sooner.seconds) / (later.samples / later.seconds),
        "samples_ratio": later.samples / sooner.samples,
    }
    return {"target": {"sooner": letter, **ratios, "A": asdict(a), "B": asdict(b)}}


def describe_comparison(target: Mapping[str, Any]) -> str:
    """Describe the comparison in a sentence."""
    sooner, later = ("A", "B") if target["sooner"] == "A" else ("B", "A")
    first = target[sooner]
    return (
        f"{sooner} reached {first['metric']} {format_number(first['value'])} sooner: in {_describe_effort(first)}; "
        f"{later} took {_describe_effort(target[later])}. Speedup x{target['ratio']:.2f} = "
        f"x{target['throughput_ratio']:.2f} from samples/s times x{target['samples_ratio']:.2f} from needing fewer "
        f"samples."
    )


def _describe_effort(run: Mapping[str, Any]) -> str:
    samples, updates = format_count(run["samples"]), format_count(run["updates"])
    return f"{format_number(run['seconds'])} s, {samples} samples and {updates} updates"
