"""The membership service with real sockets and processes that are killed, stopped and not what they should be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.elastic.events import AllLost, Ended
from launcher.elastic.membership import Membership, MembershipLimits
from launcher.elastic.messages import Hello, Leave, encode_message
from launcher.elastic.service import MAX_LINE_BYTES, ServiceSettings, ServiceThread, start_service_process
from launcher.system.processes import identify_process
from tests.helpers.jobs import wait_for
from tests.helpers.membership_processes import (
    TOKEN,
    WITHIN_S,
    MemberProcess,
    connect,
    form_round,
    identify_self,
    read_line,
    run_service,
)

pytestmark = pytest.mark.timeout(120)

LIMITS = MembershipLimits(lost_after_s=30.0)  # so that a busy machine expels nobody


def test_killed_process_is_a_lost_member() -> None:
    with run_service(expected=2) as service:
        survivor, process = connect(service.port), MemberProcess(service.port)
        try:
            process.read()
            assert form_round(survivor).world_size == 2
            assert process.read() == {"round": 1, "world_size": 2}
            process.send_signal(signal.SIGKILL)
            wait_for(lambda: survivor.change == "lost", WITHIN_S)
            round_ = form_round(survivor)
            assert [member.member for member in round_.members] == [survivor.member]
            assert (round_.number, survivor.change) == (2, None)
        finally:
            process.end()


def test_killed_process_is_lost_although_a_process_that_it_forked_lives_on() -> None:
    with run_service(expected=2) as service:
        survivor, process = connect(service.port), MemberProcess(service.port, forks=True)
        child = None
        try:
            child = process.read()["child"]
            form_round(survivor)
            process.send_signal(signal.SIGKILL)
            wait_for(lambda: survivor.change == "lost", WITHIN_S)
            os.kill(child, 0)
        finally:
            if child is not None:
                os.kill(child, signal.SIGKILL)
            process.end()


def test_stopped_process_is_expelled_and_fenced_when_it_wakes_up() -> None:
    with run_service(expected=2, lost_after_s=5.0) as service:
        survivor, process = connect(service.port), MemberProcess(service.port)
        try:
            process.read()
            form_round(survivor)
            assert process.read()["round"] == 1
            process.send_signal(signal.SIGSTOP)
            wait_for(lambda: survivor.change == "lost", WITHIN_S)
            assert form_round(survivor).world_size == 1
            process.send_signal(signal.SIGCONT)
            assert process.read() == {"state": "fenced", "lease": False}
            assert survivor.state == "joined"
        finally:
            process.end()


def test_killed_process_is_replaced_by_a_new_member() -> None:
    with run_service(expected=1) as service:
        first = connect(service.port)
        form_round(first, updates=7)
        process = MemberProcess(service.port)
        try:
            wait_for(lambda: first.change == "join", WITHIN_S)
            round_ = form_round(first, updates=8)
            assert (round_.source, round_.receivers, round_.updates) == (0, (1,), 8)
            assert process.read() == {"member": 2, "child": None}
            assert process.read() == {"round": 2, "world_size": 2}
        finally:
            process.end()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\xff\x00\xfe\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * (2 * MAX_LINE_BYTES),
        encode_message(Hello("another token", "node", 0)),
        encode_message(Hello("", "node", 0)),
        encode_message(Leave()),
        b'{"type": "hello", "node": "node", "slot": 0}\n',
        b'{"type": "hello", "token": "\\ud800", "node": "node", "slot": 0}\n',
        encode_message(Hello(TOKEN, "node", 0)) + b"no message\n",
        encode_message(Hello(TOKEN, "node", 0)) + b"x" * (2 * MAX_LINE_BYTES),
    ],
    ids=lambda sent: repr(sent[:40]),
)
def test_connection_that_sends_something_else_is_closed_alone(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with run_service() as service:
        member = connect(service.port)
        with socket.create_connection(("127.0.0.1", service.port), WITHIN_S) as other:
            try:
                other.sendall(sent)
                if not sent:
                    other.shutdown(socket.SHUT_WR)
                while other.recv(4096):
                    pass
            except ConnectionError:  # closed before everything was sent
                pass
        assert form_round(member).world_size == 1
        wait_for(lambda: [each.number for each in service.service.membership.members] == [member.member], WITHIN_S)
    assert not caplog.records


def test_members_see_that_the_service_was_killed(tmp_path: Path) -> None:
    settings = ServiceSettings(TOKEN, LIMITS, port_file=str(tmp_path / "port"), owner=identify_self())
    process = start_service_process(settings)
    try:
        port = json.loads(read_line(process))["port"]
        assert (tmp_path / "port").read_text() == f"{port}\n"
        member = connect(port)
        form_round(member)
        process.kill()
        wait_for(lambda: member.state == "service_lost", WITHIN_S)
        member.ready(1, has_state=True, host="127.0.0.1", port=1)
        member.leave()
        assert member.wait_for_round(WITHIN_S) is None
    finally:
        process.kill()
        process.wait()


def test_service_process_ends_when_training_is_complete() -> None:
    process = start_service_process(ServiceSettings(TOKEN, LIMITS, owner=identify_self()))
    try:
        port = json.loads(read_line(process))["port"]
        member = connect(port)
        form_round(member)
        member.close()
        assert json.loads(read_line(process)) == {"event": "all_lost"}
        last = connect(port)
        form_round(last, has_state=False)
        last.finish()
        assert json.loads(read_line(process)) == {"event": "complete"}
        assert process.wait(WITHIN_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("polls", [False, True], ids=["pidfd", "polling"])
def test_service_ends_with_its_owner(polls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if polls:
        monkeypatch.delattr(os, "pidfd_open")
    owner = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    limits = MembershipLimits(lost_after_s=5.0)
    service = ServiceThread(ServiceSettings(TOKEN, limits, owner=identify_process(owner.pid)))
    try:
        member = connect(service.start())
        form_round(member)
        owner.kill()
        assert service.wait(WITHIN_S) == "owner_ended"
        wait_for(lambda: member.state == "service_lost", WITHIN_S)
    finally:
        owner.kill()
        owner.communicate()


def test_service_of_an_owner_that_has_ended_ends_at_once() -> None:
    owner = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify_process(owner.pid)
    owner.communicate()
    service = ServiceThread(ServiceSettings(TOKEN, MembershipLimits(), owner=identity))
    service.start()
    assert service.wait(WITHIN_S) == "owner_ended"


@pytest.mark.parametrize("polls", [False, True], ids=["pidfd", "polling"])
def test_process_that_has_the_pid_of_the_owner_is_not_taken_for_it(
    polls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if polls:
        monkeypatch.delattr(os, "pidfd_open")
    limits = MembershipLimits(lost_after_s=5.0)
    service = ServiceThread(ServiceSettings(TOKEN, limits, owner=f"{os.getpid()}-1"))
    service.start()
    assert service.wait(WITHIN_S) == "owner_ended"


def test_nobody_is_expelled_when_the_clock_has_jumped() -> None:
    """As after the service's process was stopped, or its machine suspended."""
    jumped = threading.Event()
    with run_service(lost_after_s=5.0, clock=lambda: time.monotonic() + 1000 * jumped.is_set()) as service:
        member = connect(service.port)
        form_round(member)
        before = service.service.membership.ticked_at
        jumped.set()
        wait_for(lambda: service.service.membership.ticked_at > before + 999, WITHIN_S)
        assert service.service.membership.find_member(member.member)
        assert member.state == "joined"


def test_error_in_the_state_machine_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with run_service(lost_after_s=5.0) as service:
        member = connect(service.port)
        form_round(member)

        def fail(*_: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(Membership, "handle", fail)
        wait_for(lambda: member.state == "service_lost", WITHIN_S)
        assert service.wait(WITHIN_S) is None
        assert isinstance(service.error, RuntimeError)


def test_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServiceSettings(TOKEN, MembershipLimits(), port=taken.getsockname()[1])
        with pytest.raises(OSError, match="did not start"):
            ServiceThread(settings).start()


def test_port_that_cannot_be_published_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = ServiceSettings(TOKEN, MembershipLimits(), port_file=str(tmp_path / "file/port"))
    with pytest.raises(OSError, match="did not start"):
        ServiceThread(settings).start()


def test_process_that_takes_over_a_slot_fences_the_one_before() -> None:
    with run_service(expected=2) as service:
        survivor, older = connect(service.port), connect(service.port, slot=1)
        form_round(survivor, older)
        newer = connect(service.port, slot=1)
        wait_for(lambda: older.state == "fenced" and survivor.change == "lost", WITHIN_S)
        assert older.reason == "another process has joined from its slot"
        assert not older.holds_lease
        newer.ready(0, has_state=False, host="127.0.0.1", port=1)
        wait_for(lambda: service.service.membership.waiting_newcomers, WITHIN_S)  # or the survivor goes on alone
        round_ = form_round(survivor, newer)
        assert [member.member for member in round_.members] == [survivor.member, newer.member]


def test_losing_everybody_and_the_end_are_reported() -> None:
    reported: list[object] = []
    with run_service(report=reported.append) as service:
        lost = connect(service.port)
        form_round(lost)
        lost.close()
        wait_for(lambda: reported == [AllLost()], WITHIN_S)
        last = connect(service.port)
        assert form_round(last, has_state=False).source is None
        last.finish()
        assert service.wait(WITHIN_S) == "complete"
        assert reported == [AllLost(), Ended()]
        wait_for(lambda: last.state == "complete", WITHIN_S)


def test_token_is_not_shown() -> None:
    assert TOKEN not in repr(ServiceSettings(TOKEN, MembershipLimits()))
