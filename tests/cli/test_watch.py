"""`launcher watch`: growing files, shown as the console of the run itself shows them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import control, watch
from launcher.cli.watch import (
    OWNER_QUERY_INTERVAL_S,
    LiveView,
    convert_to_metrics_row,
    find_owner,
    follow_run,
    watch_run,
)
from launcher.errors import EXIT_OK, UsageError
from launcher.run_dir.lock import LockOwner
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.queue import SlurmJob
from launcher.system.jsonl import JsonlTail
from launcher.telemetry.records import Event
from launcher.telemetry.sinks.console import ConsoleSink
from tests.helpers import written_runs as written

DRIVER = LockOwner(12345, "a-host", "2026-11-21T10:00:00")
PENDING_JOB = SlurmJob("7", "PENDING", "", "1:00:00", "Resources")
RUNNING_JOB = SlurmJob("7", "RUNNING", "node1", "59:00", "None")
Step = Callable[[], object]


class File(io.StringIO):
    encoding = "utf-8"


class Terminal(File):
    def isatty(self) -> bool:
        return True


class OtherProcessRun:
    """A run of another process: the methods write what that process would."""

    def __init__(self, path: Path) -> None:
        (path / "checkpoints").mkdir(parents=True)
        (path / "run.yaml").write_text("seed: 0\n")
        self.run_dir = RunDirectory(path)

    def start(self, generation: int = 1, time: float = 1000.0, **facts: Any) -> None:
        known = {"recipe": "Mlp", "world": 2, "duration_samples": 6400, "data": {"train": 640, "val": 64}}
        self.event("start", time, generation=generation, run_dir="somewhere/else", **known, **facts)

    def event(self, name: str, time: float, **facts: Any) -> None:
        self._append(self.run_dir.events, [{"time": time, "event": name, **facts}])

    def rows(self, first: int, last: int, generation: int = 1, **values: Any) -> None:
        self._append(
            self.run_dir.metrics,
            [written.make_row(update, generation=generation, **values) for update in range(first, last)],
        )

    def done(self, time: float, updates: int = 100) -> None:
        facts = {"samples": 64 * updates, "updates": updates, "seconds": 3.0, "metrics": {"val/loss": 0.25}}
        self.event("done", time, **facts)
        self.run_dir.done_json.write_text(json.dumps(facts))

    def _append(self, path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
        with path.open("a") as file:
            file.writelines(f"{json.dumps(entry)}\n" for entry in entries)


@pytest.fixture
def run(tmp_path: Path) -> OtherProcessRun:
    return OtherProcessRun(tmp_path / "runs" / "x")


class WatchedOutput:
    """The output for a run. Before each poll the next step is executed; `owner` runs it until the last step."""

    def __init__(self, run: OtherProcessRun, *steps: Step, owner: object = DRIVER, stream: File | None = None) -> None:
        self.stream = stream or File()
        self.owner_queries = 0
        self._steps, self._owner, self._now_s = list(steps), owner, 0.0
        follow_run(LiveView(run.run_dir, self.stream, {}), self._find_owner, lambda: self._now_s, self._wait)

    def _wait(self, seconds: float) -> None:
        self._now_s += seconds
        assert self._now_s < 1000, "it does not end"
        if self._steps:
            self._steps.pop(0)()

    def _find_owner(self, run_dir: RunDirectory, before: object) -> Any:
        self.owner_queries += 1
        return self._owner if self._steps else None

    @property
    def text(self) -> str:
        return self.stream.getvalue()


def list_updates(text: str) -> list[int]:
    """Return the updates for which there are lines."""
    return [int(found) for found in re.findall(r"^ .*%  update (\d+) ", text, re.MULTILINE)]


# --- output -------------------------------------------------------------------------------------------------------


def test_finished_run_is_shown_like_its_console(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 100)
    run.rows(100, 101, val__loss=0.25)
    run.done(1002.0)
    seen = WatchedOutput(run)
    console = ConsoleSink(expected := File(), {})
    console.live = False
    lines = [json.loads(line) for line in run.run_dir.metrics.read_text().splitlines()]
    start, done = (json.loads(line) for line in run.run_dir.events.read_text().splitlines())
    for facts in (start, *lines, done):
        facts = {**facts, "run_dir": str(run.run_dir.path)} if facts is start else facts
        name = facts.get("event")
        console.write(Event(facts["time"], name, facts) if name else convert_to_metrics_row(facts))
    assert "finished 6,400 samples" in expected.getvalue()
    assert "bottleneck" in expected.getvalue()
    assert seen.text == expected.getvalue()


def test_appended_rows_are_shown_once(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 10)
    stages: list[list[int]] = []
    seen: list[WatchedOutput] = []
    stream = File()

    def record_state() -> None:
        stages.append(list_updates(stream.getvalue()))

    seen = WatchedOutput(
        run,
        record_state,
        lambda: run.rows(10, 11, val__loss=0.5),
        record_state,
        lambda: run.rows(11, 31, val__loss=0.5),
        record_state,
        lambda: run.done(1100.0),
        stream=stream,
    )
    assert stages == [[9], [9, 10], [9, *range(10, 31)]], "the last row at first, then each validation"
    assert seen.text.count("Mlp on 2 workers") == 1
    assert seen.text.count("\nfinished") == 1
    assert "is not running" not in seen.text


def test_partially_written_line_is_completed_first(run: OtherProcessRun) -> None:
    run.start()
    line = json.dumps(written.make_row(1, val__loss=0.5)) + "\n"
    event = json.dumps({"time": 1001.0, "event": "alarm", "detail": "slow"}) + "\n"

    def add(path: Path, text: str) -> Step:
        return lambda: path.write_text((path.read_text() if path.exists() else "") + text)

    seen = WatchedOutput(
        run,
        add(run.run_dir.metrics, line[:30]),
        add(run.run_dir.events, event[:12]),
        lambda: None,
        add(run.run_dir.metrics, line[30:-1]),
        add(run.run_dir.events, event[12:]),
        add(run.run_dir.metrics, "\n"),
        lambda: run.done(1002.0),
    )
    assert list_updates(seen.text) == [1]
    assert seen.text.count("warning: slow") == 1


@pytest.mark.parametrize("how", ["truncated", "replaced", "gone for a while"])
def test_rewritten_file_is_not_shown_again(run: OtherProcessRun, how: str) -> None:
    run.start()
    run.rows(1, 5, val__loss=0.5)

    def rewrite() -> None:
        for path in (run.run_dir.metrics, run.run_dir.events):
            text = path.read_text()
            if how != "truncated":
                path.rename(path.with_suffix(".old"))
            path.write_text(text[:-20] if how == "truncated" else text)

    def end() -> None:
        run.run_dir.metrics.write_text("")
        run.rows(1, 8, val__loss=0.5)
        run.run_dir.events.write_text("")
        run.start()
        run.done(1100.0)

    move_away = [lambda: run.run_dir.metrics.rename(run.run_dir.path / "away"), lambda: None]
    move_back = [lambda: (run.run_dir.path / "away").rename(run.run_dir.metrics)]
    seen = WatchedOutput(run, *([*move_away, *move_back] if how.startswith("gone") else [rewrite, lambda: None]), end)
    assert list_updates(seen.text) == [1, 2, 3, 4, 5, 6, 7]
    assert seen.text.count("Mlp on 2 workers") == 1
    assert seen.text.count("\nfinished") == 1


def test_invalid_lines_are_skipped(run: OtherProcessRun) -> None:
    run.start()
    with run.run_dir.metrics.open("a") as file:
        file.write('[]\nnull\n{"time": "x"}\nbroken\n\n{"time": 1, "samples": 1}\n\xff\n')
        file.write(json.dumps({**written.make_row(7), "generation": math.nan}) + "\n")
    with run.run_dir.events.open("a") as file:
        file.write('7\n{"time": 1001.0}\n{"event": "start"}\n{"time": 1001.0, "event": 3}\n')
        file.write('{"time": 1001.0, "event": "preempt", "update": null}\n{"time": NaN, "event": "alarm"}\n')
        file.write('{"time": 1001.0, "event": "checkpoint", "seconds": null}\n{"time": 1001.0, "event": "plan"}\n')
    run.rows(1, 2, train__loss=None, val__loss=0.5, val__accuracy="high")
    run.done(1100.0)
    text = WatchedOutput(run).text
    assert list_updates(text) == [1]
    assert "loss nan" in text, "JSON has no NaN: null is one"


# --- starts -------------------------------------------------------------------------------------------------------


def test_output_begins_at_the_last_start(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 50, val__loss=0.1)
    run.event("alarm", 1000.5, detail="long ago")
    run.start(2, 2000.0)
    run.rows(40, 45, 2, val__loss=0.5)
    seen = WatchedOutput(run, lambda: run.done(3000.0))
    assert list_updates(seen.text) == [40, 41, 42, 43, 44]
    assert seen.text.count("Mlp on 2 workers") == 1
    assert "Mlp on 2 workers · start 2" in seen.text
    assert "long ago" not in seen.text


def test_restart_is_shown_like_its_console(run: OtherProcessRun) -> None:
    """Repeated updates are shown once, and late rows of the old workers are not shown."""
    run.start()
    run.rows(1, 30, val__loss=0.1)

    def again() -> None:
        run.event("error", 1999.0, rank=1, generation=1, type="ValueError", message="boom", where="own.py:7")
        run.rows(30, 31, 1, val__loss=0.05)
        run.start(2, 2000.0)
        run.event("resume", 2000.0, checkpoint="update-00000020", update=20, lost_samples=640)
        run.rows(21, 26, 2, val__loss=0.5)
        run.rows(31, 32, 1, val__loss=0.01)

    def fewer() -> None:
        run.start(3, 2100.0)
        plans = [{"world": world, "global": 64, "lr": 0.1} for world in (2, 1)]
        run.event("resize", 2100.0, **{"from": plans[0], "to": plans[1], "why": "x"})

    seen = WatchedOutput(
        run, again, lambda: None, fewer, lambda: run.rows(26, 28, 3, val__loss=0.4), lambda: run.done(2200.0)
    )
    first, second, third = re.split(r"Mlp on 2 workers · start \d\n", seen.text)
    assert list_updates(first)[-2:] == [29, 30]
    assert "warning: rank 1 failed in own.py:7: ValueError: boom" in first
    assert "update-00000020 at update 20 · 640 samples are run again" in " ".join(second.split())
    assert list_updates(second) == [21, 22, 23, 24, 25]
    assert "resize 2 -> 1 worker · batch 64 -> 64" in third
    assert list_updates(third) == [26, 27]
    assert "val loss 0.25 (best 0.4 at update 26)" in " ".join(third.split()), "no best of an earlier start"


def test_rows_wait_for_their_start_event(run: OtherProcessRun) -> None:
    """Rows are read after the events: a row of a start without an event yet triggers another read of the events."""
    run.start()
    run.rows(1, 3)
    stream = File()
    view = LiveView(run.run_dir, stream, {})
    assert view.poll()
    added = view._events.read_new_objects

    def late() -> Any:
        view._events.read_new_objects = added  # type: ignore[method-assign]
        run.start(2, 900.0)  # by the clock of another machine
        run.rows(2, 4, 2, val__loss=0.5)
        return iter(())

    view._events.read_new_objects = late  # type: ignore[method-assign]
    assert view.poll()
    text = stream.getvalue()
    assert text.index("start 2") < text.index("val loss")
    assert not view.poll(), "nothing was added since"


# --- runs that are not running ------------------------------------------------------------------------------------


def test_run_without_owner_prints_its_status(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 11)
    seen = WatchedOutput(run)
    assert seen.text == f"{run.run_dir.path} is not running: at update 10, 640 samples, nothing saved\n"
    lines: list[str] = []
    control.print_status(str(run.run_dir.path), lines.append)
    assert seen.text.splitlines() == lines


def test_failed_run_ends_watching(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 11)
    failed = {"rank": 0, "generation": 1, "type": "ValueError", "message": "boom", "where": ""}
    seen = WatchedOutput(run, lambda: run.event("error", 1001.0, **failed))
    assert "warning: rank 0 failed: ValueError: boom\n" in seen.text
    assert seen.text.endswith(
        "is not running: at update 10, 640 samples, nothing saved; rank 0 failed: ValueError: boom\n"
    )


def test_stopped_run_prints_final_summary(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 11)
    seen = WatchedOutput(run, lambda: run.event("preempt", 1001.0, why="launcher stop", samples=640, update=10))
    assert "stopped at update 10, 640 samples · launcher stop · saved, nothing is lost" in seen.text
    assert "bottleneck" in seen.text
    assert seen.text.endswith("is not running: at update 10, 640 samples, nothing saved\n")


def test_preempted_run_is_watched_until_it_continues(run: OtherProcessRun) -> None:
    """A preempted job saves, waits in the queue, and continues."""
    run.start()
    run.rows(1, 3)
    idle = [lambda: None] * 60
    preempted = lambda: run.event("preempt", 1001.0, why="SIGUSR1", samples=128, update=2)  # noqa: E731
    seen = WatchedOutput(
        run, preempted, *idle, lambda: run.start(2, 2000.0), lambda: run.done(2100.0), owner=PENDING_JOB
    )
    assert seen.text.count("Slurm job 7, PENDING (Resources): at update 2, 128 samples") == 1
    assert "waiting for it to start" in seen.text
    assert seen.text.index("start 2") < seen.text.index("\nfinished")


@pytest.mark.parametrize(
    ("owner", "message"), [(DRIVER, "run by process 12345 on a-host"), (PENDING_JOB, "Slurm job 7, PENDING")]
)
def test_unstarted_run_is_reported_once_and_awaited(run: OtherProcessRun, owner: object, message: str) -> None:
    seen = WatchedOutput(run, *[lambda: None] * 100, run.start, lambda: run.done(1100.0), owner=owner)
    first = seen.text.splitlines()[0]
    assert message in first
    assert first.endswith(": no update finished yet; waiting for it to start")
    assert seen.text.count("waiting") == 1
    assert "\nfinished" in seen.text


def test_finished_run_that_continues_is_watched(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 3)
    run.done(1001.0, 2)
    seen = WatchedOutput(
        run, lambda: None, lambda: run.start(2, 2000.0), lambda: run.rows(3, 4, 2), lambda: run.done(2100.0)
    )
    assert len(re.findall("^finished", seen.text, re.MULTILINE)) == 2
    assert "start 2" in seen.text


# --- side effects and robustness ----------------------------------------------------------------------------------


def test_owner_is_not_queried_while_rows_arrive(run: OtherProcessRun) -> None:
    run.start()
    rows: list[Step] = [lambda at=at: run.rows(at, at + 1) for at in range(1, 101)]  # 25 s of polling
    seen = WatchedOutput(run, *rows, lambda: run.done(1100.0))
    assert seen.owner_queries == 1


def test_owner_query_interval_depends_on_owner_kind(run: OtherProcessRun) -> None:
    run.start()
    for owner, least, most in ((DRIVER, 12, 14), (RUNNING_JOB, 4, 5)):  # one more queue query at the end, to be sure
        seen = WatchedOutput(run, *[lambda: None] * 100, owner=owner)
        assert least <= seen.owner_queries <= most, (OWNER_QUERY_INTERVAL_S, seen.owner_queries)


def test_one_failed_queue_query_does_not_end_watching(run: OtherProcessRun) -> None:
    run.start()
    answers: list[Any] = [RUNNING_JOB, None, RUNNING_JOB, None, None]
    text, now_s = File(), [0.0]
    follow_run(
        LiveView(run.run_dir, text, {}),
        lambda *_: answers.pop(0),
        lambda: now_s[0],
        lambda seconds: now_s.__setitem__(0, now_s[0] + seconds),
    )
    assert answers == [], "watching continues after one failure, and ends after two in a row"
    assert "is not running" in text.getvalue()


def test_watching_writes_nothing_and_holds_no_lock(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 11)
    held = run.run_dir.lock()
    before = {path: path.read_bytes() for path in run.run_dir.path.rglob("*") if path.is_file()}
    text, now_s = File(), 0.0

    def wait(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        assert now_s < 100
        if 2 < now_s < 2.3:
            held.release()
            run.run_dir.lock().release()  # a job that starts while it is watched
            (run.run_dir.path / ".lock").write_bytes(before[run.run_dir.path / ".lock"])

    follow_run(LiveView(run.run_dir, text, {}), clock=lambda: now_s, wait=wait)
    assert text.getvalue().endswith("is not running: at update 10, 640 samples, nothing saved\n")
    assert {path: path.read_bytes() for path in run.run_dir.path.rglob("*") if path.is_file()} == before


def test_progress_bars_are_drawn_for_new_rows_only(run: OtherProcessRun) -> None:
    run.start()
    run.rows(1, 1001)  # 16 s of training
    bars: list[int] = []
    stream = Terminal()
    record_state = lambda: bars.append(stream.getvalue().count("%"))  # noqa: E731
    WatchedOutput(
        run, record_state, lambda: run.rows(1001, 1031), record_state, lambda: run.done(1100.0), stream=stream
    )
    assert bars == [1, 3]


def test_tail_reads_only_appended_lines(run: OtherProcessRun) -> None:
    run.rows(1, 1001)
    tail = JsonlTail(run.run_dir.metrics)
    assert len(list(tail.read_new_objects())) == 1000
    assert list(tail.read_new_objects()) == []
    blank = b" " * (run.run_dir.metrics.stat().st_size - 1) + b"\n"
    with run.run_dir.metrics.open("r+b") as file:
        file.write(blank)  # if it were read again, nothing would be found
    run.rows(1001, 1003)
    assert [row["update"] for row in tail.read_new_objects()] == [1001, 1002]


def test_ctrl_c_stops_watching_not_the_run(run: OtherProcessRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.start()

    def interrupted(view: LiveView) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "follow_run", interrupted)
    assert watch_run(str(run.run_dir.path), stream := File()) == EXIT_OK
    path = run.run_dir.path
    assert stream.getvalue() == f"stopped watching {path}: type launcher stop {path} to save and stop the run\n"
    assert not run.run_dir.stop_file.exists()


def test_unknown_run_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="y is not a run: there are no runs in runs/"):
        watch_run("y")


def test_user_torchrun_counts_as_owner_between_starts(run: OtherProcessRun) -> None:
    """Its workers hold the lock, and are absent for a moment."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    alive = LockOwner(1, socket.gethostname(), "", torchrun=os.getpid())
    dead = LockOwner(1, socket.gethostname(), "", torchrun=gone.pid)
    driver = LockOwner(os.getpid(), socket.gethostname(), "")
    assert [find_owner(run.run_dir, before) for before in (alive, dead, driver, None)] == [alive, None, None, None]
    lock = run.run_dir.lock()
    held = find_owner(run.run_dir, None)
    assert isinstance(held, LockOwner)
    assert held.pid == os.getpid()
    lock.release()
