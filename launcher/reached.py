"""Time, samples and updates until `train.target` was reached, and the comparison of two runs by them."""

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
    """Seconds of training, samples and updates until the target was reached; `value` is the metric at that time."""

    metric: str
    value: float
    seconds: float
    samples: int
    updates: int

    @classmethod
    def of(cls, folder: Path) -> Reached | None:
        """Read it from done.json; None if the file is missing or invalid, since the metrics can still be analysed."""
        with suppress(RequestError, LookupError):
            found = (RunFolder(folder).read_done() or {})["target"]
            return cls(*(found[key] for key in ("metric", "value", "seconds", "samples", "update")))
        return None


def sooner(a: Reached | None, b: Reached | None) -> dict[str, Any]:
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


def told(found: Mapping[str, Any]) -> str:
    """Describe the comparison in a sentence."""
    soon, late = ("A", "B") if found["sooner"] == "A" else ("B", "A")
    first = found[soon]
    return (
        f"{soon} reached {first['metric']} {figure(first['value'])} sooner: in {_effort(first)}; {late} took "
        f"{_effort(found[late])}. Speedup x{found['ratio']:.2f} = x{found['throughput_ratio']:.2f} from samples/s "
        f"times x{found['samples_ratio']:.2f} from needing fewer samples."
    )


def _effort(one: Mapping[str, Any]) -> str:
    return f"{figure(one['seconds'])} s, {count(one['samples'])} samples and {count(one['updates'])} updates"
