"""Failure files of the ranks: which error is reported, and how."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import UsageError
from launcher.run_dir import failures
from launcher.telemetry.sinks.jsonl import append_line


def record_failure(logs: Path, rank: int, message: str, generation: int = 1) -> failures.RankFailure:
    return failures.write_failure(logs, rank, generation, RuntimeError(message), logs / f"rank{rank}.log")


def test_root_error_precedes_its_consequences(tmp_path: Path) -> None:
    """The peer of a dead rank may record its error first, because it needs no unwinding; it is not the cause."""
    record_failure(tmp_path, 0, "[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:21936")
    record_failure(tmp_path, 1, "boom")
    record_failure(tmp_path, 1, "another", generation=2)
    found = failures.first_failure(tmp_path, since=1)
    assert found is not None
    assert (found.rank, found.message) == (1, "boom")


def test_errors_of_earlier_generations_are_ignored(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, "old", generation=1)
    assert failures.first_failure(tmp_path, since=2) is None


def test_consequence_is_reported_if_alone(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, "Connection closed by peer")
    found = failures.first_failure(tmp_path, since=1)
    assert found is not None
    assert "Connection closed" in found.summary()


def test_root_cause_is_per_generation(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, "another", generation=1)
    record_failure(tmp_path, 0, "Connection closed by peer", generation=2)
    assert failures.root_cause(tmp_path, 2) is None, "only a consequence was recorded"
    record_failure(tmp_path, 1, "boom", generation=2)
    found = failures.root_cause(tmp_path, 2)
    assert found is not None
    assert found.message == "boom"


def test_failure_event_is_logged_once(tmp_path: Path) -> None:
    events, found = tmp_path / "events.jsonl", record_failure(tmp_path, 1, "boom")
    assert not failures.is_logged(events, found)
    append_line(events, found.to_event())
    assert failures.is_logged(events, found)
    assert not failures.is_logged(events, record_failure(tmp_path, 1, "boom", generation=2))
    assert not failures.is_logged(events, record_failure(tmp_path, 0, "boom"))


def test_event_is_appended_after_torn_line(tmp_path: Path) -> None:
    events, found = tmp_path / "events.jsonl", record_failure(tmp_path, 1, "boom")
    events.write_text('{"event": "start", "rank": 0}\n{"event": "err')
    append_line(events, found.to_event())
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "error"]


def test_torn_failure_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "error-g1-r0.json").write_text('{"rank": 0')
    assert failures.first_failure(tmp_path, since=1) is None


def test_usage_error_is_fatal_with_own_message(tmp_path: Path) -> None:
    found = failures.write_failure(tmp_path, 0, 1, UsageError("seed=x is no number"), tmp_path / "log")
    assert (found.summary(), found.status, found.is_fatal) == ("seed=x is no number", 2, True)


def test_secrets_are_masked_in_failures(tmp_path: Path) -> None:
    found = record_failure(tmp_path, 0, "cannot reach https://user:hunter2@host/data?token=abc")
    assert "hunter2" not in (text := (tmp_path / "error-g1-r0.json").read_text() + found.summary())
    assert "token=abc" not in text


def test_failure_summary_is_one_line(tmp_path: Path) -> None:
    found = replace(record_failure(tmp_path, 0, "one\ntwo\n\tthree"), where="own.py:3")
    assert "\n" not in found.summary()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError(), ValueError("\n")])
def test_error_without_a_message_is_its_name(tmp_path: Path, error: BaseException) -> None:
    found = failures.write_failure(tmp_path, 0, 1, error, tmp_path / "log")
    assert found.summary() == f"rank 0 failed: {type(error).__name__} (log: {tmp_path / 'log'})"


def test_later_root_error_precedes_earlier_consequence(tmp_path: Path) -> None:
    record_failure(tmp_path, 0, "Connection closed by peer")
    failures.write_failure(tmp_path, 1, 2, RuntimeError("boom"), tmp_path / "log")
    found = failures.first_failure(tmp_path, since=1)
    assert found is not None
    assert "boom" in found.summary()


LOST_PEER_MESSAGES = [
    "[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:21936",
    "Got the following error when running the callback: RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/"
    "pair.cc:537] Read error [127.0.0.1]:18354: Connection reset by peer. This is typically caused by a remote worker",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:339] writev [::1]:18354: Broken pipe",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    "Broken pipe",
    "Connection reset by peer",
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3763, remote process exited or there was "
    "a network error, NCCL version 2.28.8 ncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely. Last error: NET/OFI Request completed with error.",
    "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL "
    "version 2.18.6 ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error. Last error: socketStartConnect: Connect to 10.0.0.14<52822> failed : Connection refused",
    "NCCL communicator was aborted on rank 1. Original reason for failure was: ncclSystemError",
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE) ran for 600000 milliseconds",
    "[5] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: Socket Timeout",
]

ROOT_CAUSE_MESSAGES = [
    "NCCL error in: NCCLUtils.hpp:275, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.20.5 "
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library. Last error: Duplicate GPU detected : rank 1"
    " and rank 0 both on CUDA device 10",
    "NCCL error in: ProcessGroupNCCL.cpp:1207, internal error, NCCL version 2.14.3 ncclInternalError: Internal check "
    "failed. Last error: Bootstrap : no socket interface found",
    "NCCL error in: ProcessGroupNCCL.cpp:1331, unhandled cuda error, NCCL version 2.26.2 ncclUnhandledCudaError: Call "
    "to CUDA function failed. Last error: Cuda failure 2 'out of memory'",
    "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled system error, NCCL version 2.18.6 ncclSystemError: System "
    "call failed. Last error: Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)",
    "Distributed package doesn't have NCCL built in",
    "No backend type associated with device type cpu, only NCCL",
    "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/device.cc:161] ifa != nullptr. Unable to find "
    "interface for: [0.0.0.0]",
    "[enforce fail at /pytorch/gloo/transport/tcp/pair.cc:459] op.preamble.length <= op.nbytes. 8 vs 4. "
    "Received data size doesn't match expected size. Is there a distributed collective mismatch in your code?",
    "[Errno 104] Connection reset by peer",
    "[Errno 32] Broken pipe",
    "('Connection aborted.', ConnectionResetError(104, 'Connection reset by peer'))",
    "Timed out waiting for the lock of /data/gloomy",
]


@pytest.mark.parametrize("message", LOST_PEER_MESSAGES)
def test_lost_connection_is_a_peer_failure(message: str) -> None:
    """What torch, gloo and NCCL report on a rank whose peer, or whose rank 0 with the store, was killed."""
    assert failures.is_peer_failure(message)


@pytest.mark.parametrize("message", ROOT_CAUSE_MESSAGES)
def test_error_of_its_own_is_no_peer_failure(message: str) -> None:
    """Errors that name NCCL, gloo or a connection and have a cause of their own."""
    assert not failures.is_peer_failure(message)
