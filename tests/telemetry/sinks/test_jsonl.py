"""metrics.jsonl and events.jsonl: one JSON object per line, whatever happens to the writer."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from launcher.telemetry.records import Event, MetricsRow
from launcher.telemetry.sinks.jsonl import JsonlSink, to_json_line


def make_row(update: int = 1, **values: float) -> MetricsRow:
    return MetricsRow(time=100.5, samples=64 * update, update=update, epoch=0, world=2, generation=1, values=values)


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_row_begins_with_position(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(make_row(3, **{"train/loss": 0.123456789012345}))
    sink.close()
    (row,) = read_lines(tmp_path / "metrics.jsonl")
    assert list(row) == ["time", "samples", "update", "epoch", "world", "generation", "train/loss"]
    assert row["samples"] == 192
    assert row["train/loss"] == 0.123456789012345


def test_events_go_to_separate_file(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.write(Event(1.0, "plan", {"global": 64, "shares": (32, 32), "folder": Path("runs/x")}))
    sink.close()
    expected = {"time": 1.0, "event": "plan", "global": 64, "shares": [32, 32], "folder": "runs/x"}
    assert read_lines(tmp_path / "events.jsonl") == [expected]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_both_files_are_readable_for_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        JsonlSink(tmp_path).close()
    finally:
        os.umask(before)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_non_finite_values_become_null() -> None:
    row = json.loads(
        to_json_line(make_row(**{"train/loss": float("nan"), "lr/value": 0.1, "train/grad_norm": float("inf")}))
    )
    assert (row["train/loss"], row["lr/value"], row["train/grad_norm"]) == (None, 0.1, None)
    event = json.loads(
        to_json_line(Event(1.0, "done", {"metrics": {"val/loss": float("-inf")}, "all": [float("nan")]}))
    )
    assert event["metrics"] == {"val/loss": None}
    assert event["all"] == [None]


def test_numpy_numbers_are_written_as_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    row = json.loads(to_json_line(make_row(a=numpy.float32(0.5), b=numpy.int64(3), c=numpy.float32("nan"))))
    assert (row["a"], row["b"], row["c"]) == (0.5, 3, None)


def test_restart_appends(tmp_path: Path) -> None:
    for update in (1, 2):
        sink = JsonlSink(tmp_path)
        sink.write(make_row(update))
        sink.close()
    assert [row["update"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"time": 1.0, "sam', b"{", b'{"time": 1.0, "long": "' + b"x" * 200_000])
def test_torn_line_is_removed(tmp_path: Path, torn: bytes) -> None:
    whole = to_json_line(make_row(1))
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
    sink = JsonlSink(tmp_path)
    sink.write(make_row(2))
    sink.close()
    assert [row["update"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_complete_line_without_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(to_json_line(make_row(1)) + to_json_line(make_row(2))[:-1])
    sink = JsonlSink(tmp_path)
    sink.write(make_row(3))
    sink.close()
    assert [row["update"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_full_disk_neither_tears_nor_repeats_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, write, room = JsonlSink(tmp_path), os.write, [40]

    def short_of_room(file: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", short_of_room)
    sink.write(make_row(1))  # started, so it counts
    with pytest.raises(OSError, match="No space"):
        sink.write(make_row(2))
    room[0] = 10_000
    sink.write(make_row(2))
    sink.close()
    assert [row["update"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_symlinked_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        JsonlSink(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "mine"
