"""Counting GPUs without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.system.gpus import count_gpus


def gpus(tmp_path: Path, number: int) -> Path:
    for index in range(number):
        (tmp_path / f"0000:0{index}:00.0").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "counted"),
    [(None, 4), ("", 0), ("0,1", 2), ("2", 1), ("0,7,1", 1), ("-1", 0), ("GPU-a,GPU-b", 2), ("0, 1 ,2", 3)],
)
def test_gpu_count_follows_cuda_visible_devices(tmp_path: Path, visible: str | None, counted: int) -> None:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(env, gpus(tmp_path, 4)) == counted


def test_machine_without_driver_has_no_gpus(tmp_path: Path) -> None:
    assert count_gpus({}, tmp_path / "nothing") == 0
