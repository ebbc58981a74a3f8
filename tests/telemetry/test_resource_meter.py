"""Memory and time of this process."""

from __future__ import annotations

import torch

from launcher.telemetry.resource_meter import ResourceMeter, read_memory_metrics


class ManualClock:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_cpu_memory_metric_is_process_memory() -> None:
    assert 10e6 < read_memory_metrics(torch.device("cpu"))["memory/peak_bytes"] < 1e12


def test_training_time_includes_earlier_generations() -> None:
    manual = ManualClock()
    meter = ResourceMeter(torch.device("cpu"), threads=1, before_s=100.0, clock=manual)
    manual.now_s = 5.0
    assert meter.seconds() == 105.0
    assert (meter.measure_wall_s(), meter.measure_wall_s()) == (5.0, 0.0)
