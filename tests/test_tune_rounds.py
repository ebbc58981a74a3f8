"""Measuring with retries, without processes: how an attempt ended, what the next one knows, and forking."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import failure
from launcher.errors import EXIT_AGAIN, EXIT_FAILED, EXIT_OK, EXIT_REQUEST, RequestError
from launcher.tune import errand
from launcher.tune.auto import Unmeasured
from launcher.tune.ledger import Ledger
from launcher.tune.rounds import EXIT_LOST, Word, in_rounds

UNDER_WAY = {"ledger": Ledger().to_facts(), "trying": 45, "spent_s": 2.0}
WELL = (Word(EXIT_OK, result={"recommended": 8}), Word(EXIT_OK))


def failed(folder: Path, rank: int, message: str, after_s: float = 0.0, *, request: bool = False) -> failure.Failure:
    error = RequestError(message) if request else RuntimeError(message)
    return replace(failure.Failure.of(rank, 1, error, folder), time=time.time() + after_s)


def only(words: Sequence[Word]) -> str:
    """Return the message for a job whose first attempt ended like this."""
    with pytest.raises(Unmeasured) as caught:
        in_rounds(lambda _, __: words)
    return str(caught.value)


def test_the_next_round_leaves_the_size_out_that_memory_ran_out_at() -> None:
    seen: list[Mapping[str, Any] | None] = []

    def start(number: int, earlier: Mapping[str, Any] | None) -> Sequence[Word]:
        seen.append(earlier)
        return WELL if number else (Word(EXIT_AGAIN, state=UNDER_WAY), Word(EXIT_LOST))

    assert in_rounds(start) == {"recommended": 8}
    assert seen[0] is None
    assert seen[1] is not None
    assert seen[1]["spent_s"] == 2.0
    assert [(one.size, one.where) for one in Ledger.from_facts(seen[1]["ledger"]).visits] == [(45, "a collective")]


def test_it_is_not_started_again_for_ever() -> None:
    words = (Word(None, state=UNDER_WAY), Word(EXIT_LOST))
    assert (
        only(words)
        == "measuring batch sizes ran out of memory 20 times: set tune.max, or type a number for batch.per_device"
    )


def test_a_killed_rank_is_named_before_what_its_end_did_to_others(tmp_path: Path) -> None:
    """Some torch messages about a lost peer are not recognised as peer failures."""
    word = failed(tmp_path, 0, "recvValue failed")
    said = only((Word(EXIT_FAILED, word, state=UNDER_WAY), Word(-9)))
    assert said == "rank 1 was killed by SIGKILL: out of memory? (while measuring per_device=45)"
    assert only((Word(None), Word(-9))) == "rank 1 was killed by SIGKILL: out of memory?"


def test_the_first_real_error_is_told_whoever_ended_first(tmp_path: Path) -> None:
    consequence = failed(tmp_path, 0, "Connection closed by peer", -1.0)
    later, real = failed(tmp_path, 0, "later", 1.0), failed(tmp_path, 1, "boom")
    assert "rank 1 failed: RuntimeError: boom" in only((Word(EXIT_AGAIN, consequence), Word(EXIT_FAILED, real)))
    assert "boom" in only((Word(EXIT_FAILED, later), Word(EXIT_FAILED, real)))
    assert "boom" in only((Word(-6), Word(EXIT_FAILED, real))), "it aborted because of the other"


def test_a_wrong_request_is_one(tmp_path: Path) -> None:
    word = failed(tmp_path, 1, "seed=x is no number", request=True)
    with pytest.raises(RequestError, match="seed=x is no number"):
        in_rounds(lambda _, __: (Word(None), Word(EXIT_REQUEST, word)))


def test_who_left_without_a_word_is_named_before_a_consequence(tmp_path: Path) -> None:
    consequence = failed(tmp_path, 0, "Connection closed by peer")
    assert only((Word(EXIT_AGAIN, consequence, UNDER_WAY), Word(7))) == "rank 1 exited with code 7"
    assert only((Word(EXIT_AGAIN, consequence), Word(-11))) == "rank 1 was killed by SIGSEGV"
    assert "Connection closed" in only((Word(EXIT_AGAIN, consequence), Word(EXIT_AGAIN)))


def test_a_word_is_the_same_after_its_way_through_the_store(tmp_path: Path) -> None:
    for word in (*WELL, Word(None, failed(tmp_path, 1, "boom"), None, UNDER_WAY)):
        assert Word.from_facts(word.to_facts()) == word


# --- when this process can be forked --------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Act like a process that has only imported modules, whatever this one has done."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(errand, "DEVICES", ("/nowhere/",))
    return monkeypatch


def test_a_process_that_did_nothing_is_copied(plain: pytest.MonkeyPatch) -> None:
    assert errand.forkable()


def test_one_that_may_have_computed_with_threads_is_not(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(torch, "get_num_threads", lambda: 2)
    assert not errand.forkable()


def test_one_with_a_context_on_a_device_is_not(plain: pytest.MonkeyPatch) -> None:
    plain.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not errand.forkable()


def test_one_that_only_asked_a_device_is_not(plain: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain.setattr(errand, "DEVICES", (f"{tmp_path}/nvidia",))
    assert errand.forkable()
    with (tmp_path / "nvidiactl").open("w"):
        assert not errand.forkable()
    assert errand.forkable()
