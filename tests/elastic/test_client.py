"""A trainer's side of the membership, against a real service."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
import weakref

import pytest

from launcher.elastic.membership import MembershipLimits
from launcher.elastic.messages import Ready
from launcher.elastic.service import ServiceSettings, start_service_process
from tests.helpers.jobs import wait_for
from tests.helpers.membership_processes import (
    TOKEN,
    WITHIN_S,
    connect,
    form_round,
    identify_self,
    read_line,
    run_service,
)

pytestmark = pytest.mark.timeout(120)


def test_wrong_token_is_an_error() -> None:
    with run_service() as service, pytest.raises(OSError, match="is the token right"):
        connect(service.port, "another token")


def test_service_that_is_not_there_is_an_error() -> None:
    with run_service() as service:
        port = service.port
    with pytest.raises(OSError, match="refused"):
        connect(port)


def test_ranks_follow_the_slots_of_the_first_round() -> None:
    with run_service(expected=2) as service:
        second, first = connect(service.port, slot=1), connect(service.port, slot=0)
        round_ = form_round(second, first)
        assert (first.rank, second.rank) == (0, 1)
        assert round_.port == 2000 + first.member


def test_waiting_for_a_round_ends_after_the_timeout() -> None:
    with run_service(expected=2) as service:
        member = connect(service.port)
        member.ready(0, has_state=False, host="127.0.0.1", port=1)
        assert member.wait_for_round(0.05) is None
        assert member.state == "joined"
        with pytest.raises(RuntimeError, match="no round yet"):
            _ = member.rank
        form_round(connect(service.port))
        assert member.wait_for_round(WITHIN_S) is not None


def test_change_is_announced_until_the_next_round() -> None:
    with run_service() as service:
        first = connect(service.port)
        form_round(first)
        assert not first.change_announced
        second = connect(service.port)
        second.ready(0, has_state=False, host="127.0.0.1", port=1)
        wait_for(lambda: first.change == "join", WITHIN_S)
        form_round(first)
        assert not first.change_announced


def test_round_that_is_repeated_is_handed_out_once() -> None:
    with run_service() as service:
        member = connect(service.port)
        form_round(member)
        member._send(Ready(0, 0, True, "127.0.0.1", 1))  # as if sent before; the answer is the round once more
        connect(service.port).ready(0, has_state=False, host="127.0.0.1", port=1)
        wait_for(lambda: member.change == "join", WITHIN_S)  # it was sent after the repeated round
        assert member.wait_for_round(0) is None


def test_leaving_member_is_released_at_the_next_round() -> None:
    with run_service(expected=2) as service:
        stays, leaves = connect(service.port), connect(service.port)
        form_round(stays, leaves)
        leaves.leave()
        wait_for(lambda: stays.change == leaves.change == "leave", WITHIN_S)
        leaves.ready(1, has_state=True, host="127.0.0.1", port=1)
        assert form_round(stays, updates=1).world_size == 1
        assert leaves.wait_for_round(WITHIN_S) is None
        assert (leaves.state, leaves.must_save) == ("released", False)
        leaves.close()
        assert leaves.state == "released"
        last = connect(service.port)
        last.ready(0, has_state=False, host="127.0.0.1", port=1)
        wait_for(lambda: stays.change is not None, WITHIN_S)
        assert stays.change == "join"


def test_last_member_that_leaves_is_told_to_save() -> None:
    with run_service() as service:
        member = connect(service.port)
        form_round(member)
        member.leave()
        member.ready(1, has_state=True, host="127.0.0.1", port=1)
        assert member.wait_for_round(WITHIN_S) is None
        assert (member.state, member.must_save) == ("released", True)


def test_everybody_who_waits_is_told_that_training_is_complete() -> None:
    with run_service(expected=2) as service:
        first, second = connect(service.port), connect(service.port)
        form_round(first, second)
        standby = connect(service.port)
        first.finish()
        wait_for(lambda: first.state == standby.state == "complete", WITHIN_S)
        with pytest.raises(OSError, match="training is complete"):
            connect(service.port)
        second.finish()
        assert service.wait(WITHIN_S) == "complete"
        wait_for(lambda: second.state == "complete", WITHIN_S)


def test_lease_is_renewed_by_each_answered_heartbeat() -> None:
    ahead = threading.Event()
    with run_service(lost_after_s=8.0) as service:
        member = connect(service.port, clock=lambda: time.monotonic() + 1000 * ahead.is_set())
        wait_for(lambda: member.holds_lease, WITHIN_S)
        ahead.set()
        wait_for(lambda: member.holds_lease, WITHIN_S)


def test_lease_ends_while_the_service_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the time in which the machine is suspended, which only the clock of the time since its start counts."""
    suspended, read_clock = threading.Event(), time.clock_gettime

    def read_late_clock(clock: int) -> float:
        return read_clock(clock) + 1000 * (clock == time.CLOCK_BOOTTIME and suspended.is_set())

    monkeypatch.setattr(time, "clock_gettime", read_late_clock)
    limits = MembershipLimits(lost_after_s=8.0)
    process = start_service_process(ServiceSettings(TOKEN, limits, owner=identify_self()))
    try:
        member = connect(json.loads(read_line(process))["port"])
        form_round(member)
        wait_for(lambda: member.holds_lease, WITHIN_S)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        suspended.set()
        assert not member.holds_lease
        assert member.state == "joined"
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: member.holds_lease, WITHIN_S)
    finally:
        process.kill()
        process.wait()


def test_closed_client_leaves_no_thread_and_is_not_kept_alive() -> None:
    before = threading.active_count()
    with run_service() as service:
        member = connect(service.port)
        kept = weakref.ref(member)
        member.close()
        assert member.state == "closed"
        del member
        wait_for(lambda: gc.collect() >= 0 and kept() is None, WITHIN_S)
    wait_for(lambda: threading.active_count() <= before, WITHIN_S)
