"""Fixtures of the integration tests: a folder with the small recipe, and the Slurm cluster."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Slurm, find_missing_programs
from tests.helpers.small_job import RECIPE

NEEDED = "LAUNCHER_NEEDS_SLURM"


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder with the small recipe in own.py."""
    (tmp_path / "own.py").write_text(RECIPE)
    return tmp_path


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """The Slurm cluster, started when first used. Without Slurm, skip; where it is required, as in .ci/run, fail."""
    why = find_missing_programs()
    if why is not None:
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)(f"no Slurm here: {why}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the daemons too
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Slurm(Path(folder)) as slurm:
        yield slurm
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster, without jobs before and after the test."""
    yield cluster
    cluster.cancel_all_jobs()
