"""Whether a failed job is requeued."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.submit import should_requeue


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    RunDirectory(tmp_path).create()
    return str(tmp_path)


def test_the_third_failure_at_the_same_place_is_the_last(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [should_requeue(run_dir, "7") for _ in range(3)] == [EXIT_OK, EXIT_OK, EXIT_FAILED]
    assert "error: failed 3 times since the same checkpoint, not requeued" in capsys.readouterr().err


def test_a_checkpoint_in_between_is_another_place(run_dir: str) -> None:
    assert [should_requeue(run_dir, "7") for _ in range(2)] == [EXIT_OK, EXIT_OK]
    RunDirectory(Path(run_dir)).record_saved_generation(1)
    assert should_requeue(run_dir, "7") == EXIT_OK


def test_many_tasks_of_a_pool_that_lose_their_rendezvous_fail_once_each(run_dir: str) -> None:
    assert {should_requeue(run_dir, f"7_{task}") for task in range(20)} == {EXIT_OK}


def test_three_starts_of_the_workers_without_a_save_are_three_failures(run_dir: str) -> None:
    for _ in range(3):
        RunDirectory(Path(run_dir)).increment_generation()
    assert should_requeue(run_dir, "7") == EXIT_FAILED
