"""Training hands over rows and events and continues, whatever the sinks do."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UsageError
from launcher.telemetry.metrics_logger import MetricsLogger
from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks import SinkContext, open_sinks
from launcher.telemetry.sinks.jsonl import JsonlSink


def make_row(update: int) -> MetricsRow:
    return MetricsRow(100.0 + update, 64 * update, update, 0, 2, 1, {"train/loss": 1.0})


class Memory:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.entries: list[MetricsRow | Event] = []
        self.closed = False

    def write(self, entry: MetricsRow | Event) -> None:
        self.entries.append(entry)

    def close(self) -> None:
        self.closed = True

    @property
    def updates(self) -> list[int]:
        return [entry.update for entry in self.entries if isinstance(entry, MetricsRow)]


class Broken(Memory):
    """A sink whose first `times` writes fail."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.write_interval_s = 0.001
        self.times = times

    def write(self, entry: MetricsRow | Event) -> None:
        if self.times > 0:
            self.times -= 1
            raise ConnectionError("the line\nis dead")
        super().write(entry)


class Stuck(Memory):
    """A sink that hangs on its first row."""

    close_timeout_s = 0.05

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def write(self, entry: MetricsRow | Event) -> None:
        self.reached.set()
        self.go.wait(60)


def read_events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def read_updates(folder: Path) -> list[int]:
    return [json.loads(line)["update"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sinks_get_all_entries_in_order() -> None:
    first, second = Memory(), Memory()
    logger = MetricsLogger([first, second], clock=lambda: 7.0)
    logger.log_event("start", world=2)
    for update in range(1, 301):
        logger.log_metrics(make_row(update))
    logger.log_event("done", samples=19200)
    logger.close()
    for sink in (first, second):
        assert sink.updates == list(range(1, 301))
        assert sink.entries[0] == Event(7.0, "start", {"world": 2})
        assert sink.entries[-1] == Event(7.0, "done", {"samples": 19200})
        assert sink.closed


def test_event_field_may_be_called_name() -> None:
    sink = Memory()
    logger = MetricsLogger([sink], clock=lambda: 0.0)
    logger.log_event("checkpoint", name="u100", event="x")
    logger.close()
    assert sink.entries == [Event(0.0, "checkpoint", {"name": "u100", "event": "x"})]


def test_log_event_writes_synchronously(tmp_path: Path) -> None:
    logger = MetricsLogger([JsonlSink(tmp_path)])
    logger.log_metrics(make_row(1))
    logger.log_event("error", rank=1, message="as if the process ended now")
    assert read_updates(tmp_path) == [1]
    assert [event["event"] for event in read_events(tmp_path)] == ["error"]
    logger.close()


def test_flush_writes_pending_rows(tmp_path: Path) -> None:
    logger = MetricsLogger([JsonlSink(tmp_path)])
    logger.log_metrics(make_row(1))
    logger.flush()
    assert read_updates(tmp_path) == [1]
    logger.close()


def test_failing_sink_is_reported_once_and_retried(tmp_path: Path) -> None:
    messages: list[str] = []
    broken = Broken(times=2)
    logger = MetricsLogger([JsonlSink(tmp_path), broken], report=messages.append)
    for update in range(1, 6):
        logger.log_metrics(make_row(update))
    broken_through = time.monotonic() + 30
    while len(broken.entries) < 5 and time.monotonic() < broken_through:
        logger.flush()
    logger.close()
    assert broken.updates == [1, 2, 3, 4, 5]
    assert messages == ["warning: broken: ConnectionError: the line is dead (training continues)"]
    (alarm,) = read_events(tmp_path)
    assert (alarm["event"], alarm["kind"]) == ("alarm", "sink")
    assert "the line is dead" in alarm["detail"]
    assert read_updates(tmp_path) == [1, 2, 3, 4, 5]


def test_broken_sink_reports_its_lost_rows(tmp_path: Path) -> None:
    messages: list[str] = []
    logger = MetricsLogger([JsonlSink(tmp_path), Broken(times=1000)], report=messages.append)
    for update in range(1, 6):
        logger.log_metrics(make_row(update))
    logger.close()
    assert messages[-1] == "warning: broken: 5 rows were not written; metrics.jsonl has them"
    assert read_updates(tmp_path) == [1, 2, 3, 4, 5]
    assert [event["event"] for event in read_events(tmp_path)] == ["alarm", "alarm"]


def test_full_queue_affects_only_its_sink(tmp_path: Path) -> None:
    messages: list[str] = []
    stuck, other = Stuck(), Memory()
    logger = MetricsLogger([JsonlSink(tmp_path), stuck, other], report=messages.append, queue_rows=10)
    logger.log_metrics(make_row(1))
    logger.log_event("plan")  # wakes the sinks
    assert stuck.reached.wait(10)
    for update in range(2, 31):
        logger.log_metrics(make_row(update))
        if update % 5 == 0:
            logger.log_event("tick")
            while len(other.updates) < update:
                logger.log_event("tick")
    start = time.monotonic()
    logger.close()
    assert time.monotonic() - start < 5
    stuck.go.set()
    assert read_updates(tmp_path) == other.updates == list(range(1, 31))
    assert "warning: stuck: did not close in time and was abandoned" in messages
    assert any("rows were not written" in line for line in messages)


def test_hanging_sink_is_abandoned() -> None:
    abandoned = threading.Event()
    stuck = Stuck()
    stuck.abandon = abandoned.set  # type: ignore[attr-defined]
    messages: list[str] = []
    logger = MetricsLogger([stuck], report=messages.append)
    logger.log_event("start")
    logger.close()
    stuck.go.set()
    assert abandoned.is_set()
    assert messages == []


def test_sink_failing_at_close_is_reported(tmp_path: Path) -> None:
    class Fails(Memory):
        def close(self) -> None:
            raise RuntimeError("too late")

    messages: list[str] = []
    logger = MetricsLogger([Fails(), JsonlSink(tmp_path)], report=messages.append)
    logger.log_metrics(make_row(1))
    logger.close()
    assert messages == ["warning: fails: RuntimeError: too late (training continues)"]
    assert read_events(tmp_path)[0]["detail"].startswith("fails: RuntimeError")


def test_event_after_close_does_not_block(tmp_path: Path) -> None:
    logger = MetricsLogger([JsonlSink(tmp_path)])
    logger.close()
    start = time.monotonic()
    logger.log_event("late")
    logger.close()
    assert time.monotonic() - start < 1


def test_jsonl_is_always_on_and_first(tmp_path: Path) -> None:
    sinks = open_sinks({"console": {}}, SinkContext(tmp_path, "run", "id"))
    assert [type(sink).__name__ for sink in sinks] == ["JsonlSink", "ConsoleSink"]
    (only,) = open_sinks({}, SinkContext(tmp_path, "run", "id"))
    assert isinstance(only, JsonlSink)


def test_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sink=consol is not a sink: choose from console, tensorboard, wandb"):
        open_sinks({"consol": None}, SinkContext(tmp_path, "run", "id"))
    assert list(tmp_path.iterdir()) == []


def test_missing_tensorboard_is_refused_with_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.telemetry.sinks.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'elastic-batch-launcher\[report\]'"):
        open_sinks({"tensorboard": {}}, SinkContext(tmp_path, "run", "id"))
    assert list(tmp_path.iterdir()) == []
