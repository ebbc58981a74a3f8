"""Measuring with retries, without processes: how an attempt ended, what the next one knows, and forking."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import EXIT_FAILED, EXIT_OK, EXIT_RESTART, EXIT_USAGE, UsageError
from launcher.goodput.auto_batch import MeasurementError
from launcher.run_dir import failures
from launcher.tune.measurements import Measurements
from launcher.tune.processes import probe_process
from launcher.tune.processes.retries import EXIT_RANK_OOM, RankResult, run_with_retries

UNDER_WAY = {"measurements": Measurements().to_facts(), "trying": 45, "spent_s": 2.0}
SUCCESS = (RankResult(EXIT_OK, result={"recommended": 8}), RankResult(EXIT_OK))


def make_failure(
    folder: Path, rank: int, message: str, after_s: float = 0.0, *, request: bool = False
) -> failures.RankFailure:
    error = UsageError(message) if request else RuntimeError(message)
    return replace(failures.RankFailure.from_exception(rank, 1, error, folder), time=time.time() + after_s)


def get_failure_message(results: Sequence[RankResult]) -> str:
    """Return the message for a job whose first attempt ended like this."""
    with pytest.raises(MeasurementError) as caught:
        run_with_retries(lambda _, __: results)
    return str(caught.value)


def test_retry_excludes_size_that_ran_out_of_memory() -> None:
    states: list[Mapping[str, Any] | None] = []

    def start(number: int, earlier: Mapping[str, Any] | None) -> Sequence[RankResult]:
        states.append(earlier)
        return SUCCESS if number else (RankResult(EXIT_RESTART, state=UNDER_WAY), RankResult(EXIT_RANK_OOM))

    assert run_with_retries(start) == {"recommended": 8}
    assert states[0] is None
    assert states[1] is not None
    assert states[1]["spent_s"] == 2.0
    assert [(one.size, one.where) for one in Measurements.from_facts(states[1]["measurements"]).measured] == [
        (45, "a collective")
    ]


def test_retries_are_limited() -> None:
    results = (RankResult(None, state=UNDER_WAY), RankResult(EXIT_RANK_OOM))
    assert (
        get_failure_message(results)
        == "measuring batch sizes ran out of memory 20 times: set tune.max, or type a number for batch.per_device"
    )


def test_killed_rank_precedes_peer_failures(tmp_path: Path) -> None:
    """Some torch messages about a lost peer are not recognised as peer failures."""
    failure = make_failure(tmp_path, 0, "recvValue failed")
    message = get_failure_message((RankResult(EXIT_FAILED, failure, state=UNDER_WAY), RankResult(-9)))
    assert message == "rank 1 was killed by SIGKILL: out of memory? (while measuring per_device=45)"
    assert get_failure_message((RankResult(None), RankResult(-9))) == "rank 1 was killed by SIGKILL: out of memory?"


def test_first_root_error_is_reported(tmp_path: Path) -> None:
    consequence = make_failure(tmp_path, 0, "Connection closed by peer", -1.0)
    later, real = make_failure(tmp_path, 0, "later", 1.0), make_failure(tmp_path, 1, "boom")
    assert "rank 1 failed: RuntimeError: boom" in get_failure_message(
        (RankResult(EXIT_RESTART, consequence), RankResult(EXIT_FAILED, real))
    )
    assert "boom" in get_failure_message((RankResult(EXIT_FAILED, later), RankResult(EXIT_FAILED, real)))
    assert "boom" in get_failure_message((RankResult(-6), RankResult(EXIT_FAILED, real))), (
        "the abort is a consequence of the other error"
    )


def test_usage_error_is_passed_on(tmp_path: Path) -> None:
    failure = make_failure(tmp_path, 1, "seed=x is no number", request=True)
    with pytest.raises(UsageError, match="seed=x is no number"):
        run_with_retries(lambda _, __: (RankResult(None), RankResult(EXIT_USAGE, failure)))


def test_silent_exit_precedes_peer_failure(tmp_path: Path) -> None:
    consequence = make_failure(tmp_path, 0, "Connection closed by peer")
    assert (
        get_failure_message((RankResult(EXIT_RESTART, consequence, UNDER_WAY), RankResult(7)))
        == "rank 1 exited with code 7"
    )
    assert (
        get_failure_message((RankResult(EXIT_RESTART, consequence), RankResult(-11))) == "rank 1 was killed by SIGSEGV"
    )
    assert "Connection closed" in get_failure_message((RankResult(EXIT_RESTART, consequence), RankResult(EXIT_RESTART)))


def test_rank_result_round_trips(tmp_path: Path) -> None:
    for result in (*SUCCESS, RankResult(None, make_failure(tmp_path, 1, "boom"), None, UNDER_WAY)):
        assert RankResult.from_facts(result.to_facts()) == result


# --- when this process can be forked --------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Act like a process that has only imported modules, whatever this one has done."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(probe_process, "DEVICE_PATHS", ("/nowhere/",))
    return monkeypatch


def test_idle_process_can_fork(plain: pytest.MonkeyPatch) -> None:
    assert probe_process.can_fork()


def test_process_with_threads_cannot_fork(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(torch, "get_num_threads", lambda: 2)
    assert not probe_process.can_fork()


def test_process_with_device_context_cannot_fork(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not probe_process.can_fork()


def test_process_with_open_device_file_cannot_fork(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setattr(probe_process, "DEVICE_PATHS", (f"{tmp_path}/nvidia",))
    assert probe_process.can_fork()
    with (tmp_path / "nvidiactl").open("w"):
        assert not probe_process.can_fork()
    assert probe_process.can_fork()
