"""The driver's view of failed starts: how a silent worker ended, and when another start is in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.run_dir import failures
from launcher.run_dir.failed_starts import FailedStarts
from launcher.run_dir.run_directory import RunDirectory
from launcher.run_dir.silent_exits import append_exit_codes, describe_silent_exit


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.create()
    return run_dir


def fail(run_dir: RunDirectory, generation: int, message: str, rank: int = 0) -> None:
    log = run_dir.get_log_path(rank, generation)
    failures.write_failure(run_dir.logs, rank, generation, RuntimeError(message), log)


def make_failed_starts(run_dir: RunDirectory, tmp_path: Path) -> FailedStarts:
    return FailedStarts(run_dir, 1, tmp_path / "exit-codes.jsonl")


def end(starts: FailedStarts, tmp_path: Path, generation: int, codes: dict[int, int]) -> bool:
    """End one start of the workers with these exit codes; return whether it repeats the one before."""
    append_exit_codes(tmp_path / "exit-codes.jsonl", codes)
    starts.observe(generation)
    return starts.is_repeated(generation)


# --- silent exits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "how"),
    [
        ({1: -9, 0: 75}, "rank 1 was killed by SIGKILL: out of memory?"),
        ({0: -11}, "rank 0 was killed by SIGSEGV"),
        ({3: 7, 0: 75}, "rank 3 exited with code 7 without an error message"),
        ({0: 75, 1: 0}, "rank 1 exited with code 0 before training ended"),
        ({0: -6, 1: 3}, "rank 1 exited with code 3 without an error message"),
        ({0: -6, 1: 75}, "rank 0 was killed by SIGABRT"),
    ],
)
def test_silent_exit_names_the_decisive_rank(tmp_path: Path, codes: dict[int, int], how: str) -> None:
    described = describe_silent_exit(codes, lambda rank: tmp_path / f"rank{rank}.log")
    assert described.startswith(how)


def test_silent_exit_quotes_the_last_line_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "rank1.log"
    log.write_text("reading\ncannot open /data/x\n\n")
    assert describe_silent_exit({0: 75, 1: 3}, lambda rank: tmp_path / f"rank{rank}.log") == (
        f'rank 1 exited with code 3 without an error message; its log ends with "cannot open /data/x" (log: {log})'
    )


def test_crash_is_located_by_the_interpreters_stack(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    log.write_text(
        "reading\nFatal Python error: Segmentation fault\n\nCurrent thread 0x01 (most recent call first):\n"
        '  File "/env/lib/python3.11/site-packages/torch/x.py", line 2 in f\n  File "/home/own.py", line 37 in loss\n'
        '  File "/home/other.py", line 1 in g\n\nExtension modules: numpy (total: 1)\n'
    )
    described = describe_silent_exit({0: -11}, lambda _: log)
    assert described == f'rank 0 was killed by SIGSEGV in /home/own.py:37; its log ends with "reading" (log: {log})'


def test_ranks_that_asked_for_a_restart_are_no_failure(tmp_path: Path) -> None:
    assert describe_silent_exit({0: 75, 1: 75}, lambda rank: tmp_path / str(rank)) == ""


def test_last_exit_is_that_of_the_latest_start(run_dir: RunDirectory, tmp_path: Path) -> None:
    starts, codes = make_failed_starts(run_dir, tmp_path), tmp_path / "exit-codes.jsonl"
    starts.observe(1)
    assert starts.last_exit == ""
    append_exit_codes(codes, {1: 3})
    starts.observe(1)
    append_exit_codes(codes, {0: -9})
    starts.observe(2)
    assert starts.last_exit.startswith("rank 0 was killed by SIGKILL")
    assert "rank0-g2.log" in starts.last_exit


# --- repeated errors ----------------------------------------------------------------------------------------------


def test_same_error_twice_before_any_update_is_final(run_dir: RunDirectory, tmp_path: Path) -> None:
    """Numbers and addresses in the message differ from start to start, as in `<object at 0x7f01>`."""
    starts = make_failed_starts(run_dir, tmp_path)
    fail(run_dir, 1, "cannot use <Item object at 0x7f01> of 12 items")
    assert not end(starts, tmp_path, 1, {0: 1, 1: 75})
    fail(run_dir, 2, "cannot use <Item object at 0x7f99> of 7.5e-06 items", rank=1)
    assert end(starts, tmp_path, 2, {0: 75, 1: 1})
    assert starts.is_repeated(3), "also if the third start has already begun"
    assert starts.repeated == 1


def test_repeated_error_may_follow_another(run_dir: RunDirectory, tmp_path: Path) -> None:
    starts = make_failed_starts(run_dir, tmp_path)
    for generation, message in enumerate(["disk quota exceeded", "no such file", "no such file"], start=1):
        fail(run_dir, generation, message)
        assert end(starts, tmp_path, generation, {0: 1}) == (generation == 3)
    assert starts.repeated == 2, "this is the error to report"


@pytest.mark.parametrize("trained", [1, 2])
def test_same_error_after_an_update_is_not_final(run_dir: RunDirectory, tmp_path: Path, trained: int) -> None:
    starts = make_failed_starts(run_dir, tmp_path)
    run_dir.record_trained_generation(trained)
    for generation in (1, 2):
        fail(run_dir, generation, "boom")
        assert not end(starts, tmp_path, generation, {0: 1})


def test_error_of_an_earlier_job_does_not_count(run_dir: RunDirectory, tmp_path: Path) -> None:
    fail(run_dir, 1, "boom")
    starts = FailedStarts(run_dir, 2, tmp_path / "exit-codes.jsonl")
    fail(run_dir, 2, "boom")
    assert not end(starts, tmp_path, 2, {0: 1})


def test_error_beside_a_killed_rank_is_not_final(run_dir: RunDirectory, tmp_path: Path) -> None:
    """Not every message of torch about a lost peer is recognised."""
    starts = make_failed_starts(run_dir, tmp_path)
    for generation in (1, 2):
        fail(run_dir, generation, "an unknown message about the store")
        assert not end(starts, tmp_path, generation, {0: 1, 1: -9})


@pytest.mark.parametrize(("code", "is_final"), [(3, True), (-11, True), (-9, False), (-15, False), (75, False)])
def test_same_exit_code_twice_is_final_unless_from_outside(
    run_dir: RunDirectory, tmp_path: Path, code: int, is_final: bool
) -> None:
    starts = make_failed_starts(run_dir, tmp_path)
    for generation in (1, 2):
        fail(run_dir, generation, "Connection closed by peer", rank=1)
        assert end(starts, tmp_path, generation, {0: code, 1: 75}) == (is_final and generation == 2)
