"""The cluster that the tests of Slurm share: started once, when the first of them asks for it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import Slurm, missing

NEEDED = "LAUNCHER_NEEDS_SLURM"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    """Skips where Slurm cannot be had; where it has to be, as in .ci/run, that is a failure."""
    why = missing()
    if why is not None:
        (pytest.fail if os.environ.get(NEEDED) else pytest.skip)(f"no Slurm here: {why}")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended early, the daemons are ended with it
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, Slurm(Path(folder)) as slurm:
        yield slurm
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    """The cluster with no jobs in it, before the test and after."""
    yield cluster
    cluster.clear()
