"""The Slurm cluster shared by the tests: started once, when first used."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_cluster import Slurm, missing

NEEDED = "LAUNCHER_NEEDS_SLURM"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """Skip if Slurm is not available; where it is required, as in .ci/run, fail."""
    why = missing()
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
    cluster.clear()
