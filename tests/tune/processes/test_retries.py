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

UNDER_WAY = {"ledger": Measurements().to_facts(), "trying": 45, "spent_s": 2.0}
WELL = (RankResult(EXIT_OK, result={"recommended": 8}), RankResult(EXIT_OK))


def failed(
    folder: Path, rank: int, message: str, after_s: float = 0.0, *, request: bool = False
) -> failures.RankFailure:
    error = UsageError(message) if request else RuntimeError(message)
    return replace(failures.RankFailure.from_exception(rank, 1, error, folder), time=time.time() + after_s)


def only(words: Sequence[RankResult]) -> str:
    """Return the message for a job whose first attempt ended like this."""
    with pytest.raises(MeasurementError) as caught:
        run_with_retries(lambda _, __: words)
    return str(caught.value)


def test_the_next_round_leaves_the_size_out_that_memory_ran_out_at() -> None:
    seen: list[Mapping[str, Any] | None] = []

    def start(number: int, earlier: Mapping[str, Any] | None) -> Sequence[RankResult]:
        seen.append(earlier)
        return WELL if number else (RankResult(EXIT_RESTART, state=UNDER_WAY), RankResult(EXIT_RANK_OOM))

    assert run_with_retries(start) == {"recommended": 8}
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[1]["spent_s"] == 2.0
    assert [(one.size, one.where) for one in Measurements.from_facts(seen[1]["ledger"]).visits] == [
        (45, "a collective")
    ]


def test_it_is_not_started_again_for_ever() -> None:
    words = (RankResult(None, state=UNDER_WAY), RankResult(EXIT_RANK_OOM))
    assert (
        only(words)
        == "measuring batch sizes ran out of memory 20 times: set tune.max, or type a number for batch.per_device"
    )


def test_a_killed_rank_is_named_before_what_its_end_did_to_others(tmp_path: Path) -> None:
    """Some torch messages about a lost peer are not recognised as peer failures."""
    word = failed(tmp_path, 0, "recvValue failed")
    said = only((RankResult(EXIT_FAILED, word, state=UNDER_WAY), RankResult(-9)))
    assert said == "rank 1 was killed by SIGKILL: out of memory? (while measuring per_device=45)"
    assert only((RankResult(None), RankResult(-9))) == "rank 1 was killed by SIGKILL: out of memory?"


def test_the_first_real_error_is_told_whoever_ended_first(tmp_path: Path) -> None:
    consequence = failed(tmp_path, 0, "Connection closed by peer", -1.0)
    later, real = failed(tmp_path, 0, "later", 1.0), failed(tmp_path, 1, "boom")
    assert "rank 1 failed: RuntimeError: boom" in only(
        (RankResult(EXIT_RESTART, consequence), RankResult(EXIT_FAILED, real))
    )
    assert "boom" in only((RankResult(EXIT_FAILED, later), RankResult(EXIT_FAILED, real)))
    assert "boom" in only((RankResult(-6), RankResult(EXIT_FAILED, real))), "it aborted because of the other"


def test_a_wrong_request_is_one(tmp_path: Path) -> None:
    word = failed(tmp_path, 1, "seed=x is no number", request=True)
    with pytest.raises(UsageError, match="seed=x is no number"):
        run_with_retries(lambda _, __: (RankResult(None), RankResult(EXIT_USAGE, word)))


def test_who_left_without_a_word_is_named_before_a_consequence(tmp_path: Path) -> None:
    consequence = failed(tmp_path, 0, "Connection closed by peer")
    assert only((RankResult(EXIT_RESTART, consequence, UNDER_WAY), RankResult(7))) == "rank 1 exited with code 7"
    assert only((RankResult(EXIT_RESTART, consequence), RankResult(-11))) == "rank 1 was killed by SIGSEGV"
    assert "Connection closed" in only((RankResult(EXIT_RESTART, consequence), RankResult(EXIT_RESTART)))


def test_a_word_is_the_same_after_its_way_through_the_store(tmp_path: Path) -> None:
    for result in (*WELL, RankResult(None, failed(tmp_path, 1, "boom"), None, UNDER_WAY)):
        assert RankResult.from_facts(result.to_facts()) == result


# --- when this process can be forked --------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Act like a process that has only imported modules, whatever this one has done."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(probe_process, "DEVICE_PATHS", ("/nowhere/",))
    return monkeypatch


def test_a_process_that_did_nothing_is_copied(plain: pytest.MonkeyPatch) -> None:
    assert probe_process.can_fork()


def test_one_that_may_have_computed_with_threads_is_not(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(torch, "get_num_threads", lambda: 2)
    assert not probe_process.can_fork()


def test_one_with_a_context_on_a_device_is_not(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not probe_process.can_fork()


def test_one_that_only_asked_a_device_is_not(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setattr(probe_process, "DEVICE_PATHS", (f"{tmp_path}/nvidia",))
    assert probe_process.can_fork()
    with (tmp_path / "nvidiactl").open("w"):
        assert not probe_process.can_fork()
    assert probe_process.can_fork()
