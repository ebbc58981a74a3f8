"""Whether a failed job is requeued."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import EXIT_FAILED, EXIT_OK
from launcher.run_dir.run_directory import RunDirectory
from launcher.slurm.submit import compute_requeue_status


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    RunDirectory(tmp_path).create()
    return str(tmp_path)


def test_third_failure_is_not_requeued(run_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [compute_requeue_status(run_dir, "7") for _ in range(3)] == [EXIT_OK, EXIT_OK, EXIT_FAILED]
    assert "error: failed 3 times since the same checkpoint, not requeued" in capsys.readouterr().err


def test_checkpoint_resets_the_failure_count(run_dir: str) -> None:
    assert [compute_requeue_status(run_dir, "7") for _ in range(2)] == [EXIT_OK, EXIT_OK]
    RunDirectory(Path(run_dir)).record_saved_generation(1)
    assert compute_requeue_status(run_dir, "7") == EXIT_OK


def test_array_tasks_count_failures_separately(run_dir: str) -> None:
    assert {compute_requeue_status(run_dir, f"7_{task}") for task in range(20)} == {EXIT_OK}


def test_unsaved_generations_count_as_failures(run_dir: str) -> None:
    for _ in range(3):
        RunDirectory(Path(run_dir)).increment_generation()
    assert compute_requeue_status(run_dir, "7") == EXIT_FAILED
