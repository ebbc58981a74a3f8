"""Number of workers, and threads per worker."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.schema import ElasticConfig, LaunchConfig, RunConfig, TrainConfig
from launcher.distributed.commands import make_torchrun_command
from launcher.distributed.worker_env import read_user_omp_threads, resolve_num_threads, resolve_num_workers


def test_default_threads_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    for workers in (1, 2, 64):
        env = make_torchrun_command(RunConfig(), workers, Path("h"), Path("f")).env
        assert env["OMP_NUM_THREADS"] == str(max(1, cores // workers))


def test_threads_follow_user_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver sets OMP_NUM_THREADS for its workers; under the user's torchrun, torchrun sets it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    handed = make_torchrun_command(RunConfig(), 1, Path("h"), Path("f")).env
    assert handed["OMP_NUM_THREADS"] == "5"
    assert resolve_num_threads(RunConfig(), 1, handed) == 5
    typed = RunConfig(launch=LaunchConfig(threads=3))
    assert make_torchrun_command(typed, 1, Path("h"), Path("f")).env["OMP_NUM_THREADS"] == "3"
    assert resolve_num_threads(typed, 1, handed) == 3
    assert resolve_num_threads(replace(RunConfig(), elastic=ElasticConfig(exact=True)), 1, handed) == 1
    for senseless in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", senseless)
        assert read_user_omp_threads(RunConfig()) == {}


def test_num_workers_defaults_to_gpus_or_one() -> None:
    assert resolve_num_workers(RunConfig(launch=LaunchConfig(workers=5))) == 5
    assert resolve_num_workers(RunConfig(train=TrainConfig(device="cpu"))) == 1
