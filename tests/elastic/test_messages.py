"""Messages survive the wire, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest

from launcher.elastic.messages import (
    Change,
    Complete,
    Fenced,
    Finish,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Leave,
    MessageError,
    Ready,
    Release,
    Round,
    RoundMember,
    Welcome,
    decode_answer,
    decode_request,
    encode_message,
)

MEMBERS = (RoundMember(4, "a", 0, 41, True), RoundMember(7, "b", 1, 0, False))
REQUESTS = [Hello("token", "node", 2), Ready(3, 41, True, "10.0.0.1", 29500), Heartbeat(123), Leave(), Finish(3)]
ANSWERS = [
    Welcome(4, 3.0),
    Round(3, MEMBERS, 0, (1,), "10.0.0.1", 29500),
    Round(3, MEMBERS, None, (), "10.0.0.1", 29500),
    Change("lost"),
    Release(save=True),
    Complete(),
    HeartbeatAnswer(123),
    Fenced("no heartbeat"),
]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda each: type(each).__name__)
def test_request_survives_the_wire(message: Hello) -> None:
    line = encode_message(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_request(line) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda each: type(each).__name__)
def test_answer_survives_the_wire(message: Welcome) -> None:
    assert decode_answer(encode_message(message)) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"\xff\xfe\n",
        b"GET / HTTP/1.1\n",
        b"[" * 50_000,
        b"9" * 5_000,
        b"null",
        b"[]",
        b"{}",
        b'{"type": []}',
        b'{"type": "round"}',
        b'{"type": "ready"}',
        b'{"type": "leave", "after": 1}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_line_that_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(MessageError):
        decode_request(line)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("after", -1),
        ("after", True),
        ("after", 1.0),
        ("updates", None),
        ("updates", 2**70),
        ("has_state", 1),
        ("host", 5),
        ("host", "x" * 300),
        ("port", "29500"),
    ],
)
def test_wrong_value_is_refused(field: str, value: object) -> None:
    values = {**json.loads(encode_message(Ready(3, 41, True, "host", 29500))), field: value}
    with pytest.raises(MessageError, match=field):
        decode_request(json.dumps(values).encode())


@pytest.mark.parametrize(
    "change",
    [{"members": None}, {"members": [1]}, {"members": [{}]}, {"receivers": ["0"]}, {"source": -1}, {"number": None}],
    ids=str,
)
def test_round_with_a_wrong_value_is_refused(change: dict[str, object]) -> None:
    values = {**json.loads(encode_message(Round(3, MEMBERS, 0, (1,), "host", 29500))), **change}
    with pytest.raises(MessageError):
        decode_answer(json.dumps(values).encode())


def test_reason_of_a_change_is_one_of_those_known() -> None:
    with pytest.raises(MessageError):
        decode_answer(b'{"type": "change", "reason": "mood"}')
