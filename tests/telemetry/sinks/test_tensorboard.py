"""TensorBoard files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.telemetry.records import MetricsRow


def test_tensorboard_files_contain_rows(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from launcher.telemetry.records import Event
    from launcher.telemetry.sinks.tensorboard import TensorboardSink

    sink = TensorboardSink(tmp_path)
    for update in (1, 2, 3):
        sink.write(MetricsRow(1000.0 + update, 64 * update, update, 0, 2, 1, {"train/loss": 1 / update}))
    sink.write(Event(1004.0, "done", {"samples": 192}))
    sink.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(scalar.step, scalar.wall_time) for scalar in found.Scalars("train/loss")] == [
        (64, 1001.0),
        (128, 1002.0),
        (192, 1003.0),
    ]
    assert json.dumps(found.Tags()["tensors"]) == '["event/done/text_summary"]'
