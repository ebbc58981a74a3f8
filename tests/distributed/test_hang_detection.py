"""Hang detection: tables of heartbeats of the ranks of a node, and the expected verdict."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.distributed import watchdog
from launcher.distributed.hang_detection import HangTimeouts, PhaseTimeouts, RankState, detect_hang, elect_reporter
from launcher.distributed.watchdog import SharedHeartbeats, Watchdog
from launcher.run_dir.failures import first_failure
from launcher.run_dir.run_directory import RunDirectory
from launcher.topology import Topology

LIMITS = HangTimeouts(hang_s=8.0, first_s=600.0)
NOW = 1000.0


def rank_state(
    number: int, phase: str, for_s: float, *, silent_s: float = 0.1, allowed_s: float = 8.0, **more: Any
) -> RankState:
    """A rank that has been in a phase for some time, with its last heartbeat `silent_s` ago."""
    return RankState(number, 100 + number, phase, 7, NOW - for_s, allowed_s, NOW - silent_s, **more)


STOPPED = {"silent_s": 4.5, "stopped": True}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        pytest.param([rank_state(0, "forward", 3), rank_state(1, "sync", 3)], None, id="an update of 3 s"),
        pytest.param(
            [rank_state(0, "data", 9), rank_state(1, "sync", 9)], (0, "stuck"), id="a stuck loader, the other waits"
        ),
        pytest.param(
            [rank_state(0, "data", 9), rank_state(1, "sync", 1)], None, id="both were slow: nobody has waited for long"
        ),
        pytest.param([rank_state(0, "data", 9), rank_state(1, "data", 9)], None, id="slow data everywhere"),
        pytest.param([rank_state(0, "data", 33), rank_state(1, "data", 40)], (1, "all"), id="data that never come"),
        pytest.param([rank_state(0, "sync", 31), rank_state(1, "sync", 31)], None, id="a slow collective"),
        pytest.param([rank_state(0, "sync", 33), rank_state(1, "sync", 34)], (1, "all"), id="a stuck collective"),
        pytest.param([rank_state(0, "backward", 33)], (0, "all"), id="a rank that hangs alone"),
        pytest.param([rank_state(0, "sync", 5), rank_state(1, "forward", 5, **STOPPED)], (1, "stopped"), id="SIGSTOP"),
        pytest.param(
            [rank_state(0, "data", 5), rank_state(1, "sync", 5, **STOPPED)], (1, "stopped"), id="SIGSTOP while it waits"
        ),
        pytest.param(
            [rank_state(0, "sync", 7), rank_state(1, "forward", 7, silent_s=7)], None, id="it computes without a pause"
        ),
        pytest.param(
            [rank_state(0, "sync", 9), rank_state(1, "forward", 9, silent_s=9)], (1, "stuck"), id="too long, however"
        ),
        pytest.param(
            [rank_state(0, "data", 2), rank_state(1, "sync", 9, silent_s=9)], (1, "silent"), id="waits without a beat"
        ),
        pytest.param(
            [rank_state(0, "sync", 9), rank_state(1, "forward", 10), rank_state(2, "data", 9.5)],
            (1, "stuck"),
            id="the first of several",
        ),
        pytest.param(
            [rank_state(0, "checkpoint", 50, allowed_s=600), rank_state(1, "sync", 50)],
            None,
            id="the first save takes its time",
        ),
        pytest.param(
            [rank_state(0, "validate", 90, allowed_s=100), rank_state(1, "validate", 90, allowed_s=100)], None, id="val"
        ),
        pytest.param(
            [rank_state(0, "sync", 300, allowed_s=600), rank_state(1, "sync", 300)], None, id="all in the first update"
        ),
        pytest.param([], None, id="nobody is there yet"),
    ],
)
def test_hang_verdict(states: list[RankState], expected: tuple[int, str] | None) -> None:
    found = detect_hang(states, NOW, LIMITS)
    assert (None if found is None else (found.state.rank, found.kind)) == expected


def test_time_asleep_does_not_count_as_hang() -> None:
    """A suspended job: all ranks were stopped, and the first to wake sees outdated heartbeats of the others."""
    states = [rank_state(0, "sync", 3600), rank_state(1, "forward", 3600, silent_s=3600, stopped=True)]
    assert detect_hang(states, NOW, LIMITS, watching_since=NOW - 1) is None
    found = detect_hang(states, NOW, LIMITS, watching_since=NOW - 5)
    assert found is not None
    assert found.seconds == 5


def test_exactly_one_healthy_rank_reports() -> None:
    hung = rank_state(2, "forward", 20)
    others = [rank_state(0, "sync", 20), rank_state(1, "sync", 20), rank_state(3, "sync", 20)]
    verdict = detect_hang([*others, hung], NOW, LIMITS)
    assert verdict is not None
    assert elect_reporter([*others, hung], verdict, NOW, LIMITS) == 1, "each watches the next"
    others[1] = replace(others[1], beat=NOW - 60)
    assert elect_reporter([*others, hung], verdict, NOW, LIMITS) == 0
    assert elect_reporter([others[2], hung], verdict, NOW, LIMITS) == 3, "around the ring"
    assert elect_reporter([hung], verdict, NOW, LIMITS) is None


def test_verdict_needs_confirmation() -> None:
    first_look = detect_hang([rank_state(0, "data", 9), rank_state(1, "sync", 9)], NOW, LIMITS)
    again = detect_hang([rank_state(0, "data", 9), rank_state(1, "sync", 9)], NOW + 1, LIMITS)
    moved_on = detect_hang([rank_state(0, "forward", 9), rank_state(1, "sync", 9)], NOW + 1, LIMITS)
    assert again is not None
    assert moved_on is not None
    assert again.confirms(first_look)
    assert not moved_on.confirms(first_look)
    assert not again.confirms(None)


def run_updates(timeouts: PhaseTimeouts, count: int, each_s: float, start: int = 1, now: float = 0.0) -> float:
    for update in range(start, start + count):
        for phase in ("data", "forward", "backward", "sync", "optimizer"):
            timeouts.record_phase(phase, update, now)
        now += each_s
    return now


def test_phase_timeout_is_10_median_updates() -> None:
    timeouts = PhaseTimeouts(LIMITS)
    assert timeouts.record_phase("rendezvous", 0, 0.0) == 600
    assert timeouts.record_phase("data", 1, 5.0) == 600, "the first update sets up what the others use"
    now = run_updates(timeouts, 5, 0.1)
    assert timeouts.record_phase("forward", 6, now) == 8
    timeouts = PhaseTimeouts(LIMITS)
    now = run_updates(timeouts, 30, 2.0)
    assert timeouts.record_phase("forward", 31, now) == pytest.approx(20)


def test_validation_and_checkpoint_timeouts_follow_own_history() -> None:
    timeouts = PhaseTimeouts(LIMITS)
    now = run_updates(timeouts, 3, 0.1)
    assert timeouts.record_phase("validate", 3, now) == 600
    now = run_updates(timeouts, 3, 0.1, start=4, now=now + 30)
    assert timeouts.record_phase("validate", 6, now) == pytest.approx(300)
    assert timeouts.record_phase("data", 7, now + 3) == 8, "an update's phases are not"
    assert timeouts.record_phase("checkpoint", 7, now + 4) == 600


def test_sync_after_checkpoint_gets_longer_timeout() -> None:
    timeouts = PhaseTimeouts(LIMITS)
    now = run_updates(timeouts, 3, 0.1)
    timeouts.record_phase("checkpoint", 3, now)
    timeouts.record_phase("data", 4, now)
    assert timeouts.record_phase("sync", 4, now + 1) >= 8
    timeouts.record_phase("optimizer", 4, now + 21)
    timeouts.record_phase("checkpoint", 4, now + 22)
    timeouts.record_phase("data", 5, now + 22)
    assert timeouts.record_phase("sync", 5, now + 22) == pytest.approx(200)
    timeouts.record_phase("optimizer", 5, now + 22)
    assert timeouts.record_phase("sync", 6, now + 23) == 8


def test_compiled_phases_get_first_timeout() -> None:
    timeouts = PhaseTimeouts(LIMITS, compiles=True)
    now = run_updates(timeouts, 5, 0.1)
    assert timeouts.record_phase("forward", 6, now) == 600
    assert timeouts.record_phase("optimizer", 6, now) == 8


# --- the heartbeat file, the thread, and its actions --------------------------------------------------------------


class Node:
    """Two ranks of one node whose processes exist only in the table."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = NOW
        self.run_dir = RunDirectory(tmp_path / "run")
        self.run_dir.create()
        self.process_states = {os.getpid(): "S", 200: "S", 201: "S"}
        self.signals: list[tuple[int, int]] = []
        self.exit_codes: list[int] = []
        self.slots = SharedHeartbeats(tmp_path / "beat", 2)
        self.screen = io.StringIO()
        monkeypatch.setattr(watchdog, "read_sibling_state", self.process_states.get)
        monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
        monkeypatch.setattr(watchdog.os, "kill", lambda pid, number: self.signals.append((pid, number)))
        self.ranks = [self.make_watchdog(number) for number in (0, 1)]
        for number, one in enumerate(self.ranks):
            one.enter_phase("data", 1)
            self.slots.set_heartbeat(number, 200 + number, self.now)

    def make_watchdog(self, number: int) -> Watchdog:
        topology = Topology(rank=number, world=2, local_rank=number, local_world=2, generation=1)
        timeouts = PhaseTimeouts(LIMITS)
        return Watchdog(
            self.slots, self.run_dir, topology, timeouts, self.screen, lambda: self.now, self.exit_codes.append
        )

    def advance(self, seconds: float, beating: tuple[int, ...] = (0, 1), checking: tuple[int, ...] = (0,)) -> None:
        for _ in range(round(seconds / 0.25)):
            self.now += 0.25
            for number in beating:
                self.slots.set_heartbeat(number, 200 + number, self.now)
            for number in checking:
                self.ranks[number].check_peers()

    def read_alarms(self) -> list[dict[str, Any]]:
        text = self.run_dir.events.read_text() if self.run_dir.events.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_stopped_rank_is_killed_and_reported_once(node: Node) -> None:
    for number in (0, 1):
        node.ranks[number].enter_phase("data", 6)
    node.ranks[1].enter_phase("forward", 6)
    node.ranks[0].enter_wait()
    node.process_states[201] = "T"
    node.advance(4.75, beating=(0,))
    assert node.signals == [(201, signal.SIGKILL)]
    node.process_states[201] = "Z"
    node.advance(0.5, beating=(0,))
    (alarm,) = node.read_alarms()
    assert (alarm["event"], alarm["kind"], alarm["rank"], alarm["phase"], alarm["update"]) == (
        *("alarm", "hang", 1),
        *("forward", 6),
    )
    assert node.screen.getvalue().count("rank 1 hung in forward of update 6") == 1
    failure = first_failure(node.run_dir.logs, 1)
    assert failure is not None
    assert failure.summary().startswith("rank 1 failed in forward of update 6: Hang: its process is stopped")


def test_running_rank_dumps_stacks_before_kill(node: Node) -> None:
    for update in (1, 2):
        for one in node.ranks:
            one.enter_phase("data", update)
    node.ranks[0].enter_wait()
    node.advance(9)
    assert node.signals == [(201, signal.SIGUSR2), (201, signal.SIGKILL)]
    assert "stacks in" in node.read_alarms()[0]["detail"]


def test_stuck_collective_ends_the_node(node: Node) -> None:
    for update in (1, 2):
        for one in node.ranks:
            one.enter_phase("data", update)
            one.enter_wait()
    for one in node.ranks:
        one.enter_phase("optimizer", 2)
        one.enter_wait()
    node.advance(32, checking=(0, 1))
    assert not node.signals
    node.advance(1, checking=(0, 1))
    assert node.signals == [(200, signal.SIGUSR2), (201, signal.SIGUSR2), (201, signal.SIGKILL)]
    assert node.exit_codes == [75]
    assert "no rank of this node makes progress" in node.read_alarms()[0]["detail"]


def test_survivors_exit_after_dead_rank_unless_saving(node: Node) -> None:
    node.process_states[201] = "Z"
    node.ranks[0].enter_phase("checkpoint", 3)
    node.advance(3, beating=(0,))
    assert not node.exit_codes
    node.ranks[0].enter_wait()
    node.advance(1.5, beating=(0,))
    assert node.exit_codes[0] == 75
    assert not node.signals


def test_node_is_busy_while_any_rank_validates_or_saves(node: Node) -> None:
    assert [one.node_is_busy() for one in node.ranks] == [False, False]
    for phase in ("validate", "checkpoint", "finish"):
        node.ranks[0].enter_wait()
        node.ranks[1].enter_phase(phase, 3)
        assert [one.node_is_busy() for one in node.ranks] == [True, True]
    node.ranks[1].enter_wait()
    assert not node.ranks[0].node_is_busy()


def test_finished_rank_is_not_reported(node: Node) -> None:
    node.ranks[0].enter_wait()
    node.ranks[1].stop(finished=True)
    node.process_states[201] = "Z"
    node.advance(5, beating=(0,))
    assert not node.exit_codes


def test_heartbeat_file_is_unlinked_after_all_joined(node: Node, tmp_path: Path) -> None:
    node.slots.set_heartbeat(1, 0, NOW)
    node.ranks[0].unlink_when_all_joined()
    assert (tmp_path / "beat").exists()
    node.slots.set_heartbeat(1, 201, NOW)
    node.ranks[1].unlink_when_all_joined()
    assert not (tmp_path / "beat").exists()


def test_heartbeat_file_refuses_symlink(tmp_path: Path) -> None:
    (tmp_path / "beat").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="beat"):
        SharedHeartbeats(tmp_path / "beat", 2)
