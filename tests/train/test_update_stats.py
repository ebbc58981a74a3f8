"""The host reads a loss count only where that needs no waiting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.telemetry.stats_fields import NUM_STATS
from launcher.train.loop import step_optimizer
from launcher.train.micro_batches import LossSums


def make_context(*, reads_late: bool, decides_on_host: bool, normalizers: list[Any]) -> Any:
    def step(lr: float, momentum: float | None, normalizer: Any, clip_norm: float | None) -> Any:
        normalizers.append(normalizer)
        return SimpleNamespace(finite=True, norm=1.0, group_sq_norm_sum=0.0, groups=0)

    return SimpleNamespace(
        reads_late=reads_late,
        replica=SimpleNamespace(decides_on_host=decides_on_host, step=step, pop_later_parameters=list),
        config=SimpleNamespace(train=SimpleNamespace(clip_norm=None)),
        precision=SimpleNamespace(lower_scale=lambda ratio: None),
        clock=SimpleNamespace(lap=lambda stage: None),
        enter_phase=lambda phase, update: None,
    )


def step_with(table: torch.Tensor, **options: bool) -> Any:
    """The normalizer that the replica is given for this table of statistics."""
    normalizers: list[Any] = []
    context = make_context(normalizers=normalizers, reads_late=True, **options)
    update: Any = SimpleNamespace(samples=6, index=9)
    gathered: Any = SimpleNamespace(update=None, finite=True)
    step_optimizer(context, update, SimpleNamespace(lr=0.1, momentum=None), LossSums(), table, gathered)  # type: ignore[arg-type]
    return normalizers[0]


def test_loss_count_on_a_device_is_not_read() -> None:
    """A meta tensor has no value: reading it raises, as it would make the host wait for a GPU."""
    normalizer = step_with(torch.zeros(2, 1, NUM_STATS, dtype=torch.float64, device="meta"), decides_on_host=False)
    assert isinstance(normalizer, torch.Tensor)
    assert normalizer.device.type == "meta"


def test_strategy_that_decides_on_the_host_is_given_a_number() -> None:
    table = torch.zeros(2, 1, NUM_STATS, dtype=torch.float64)
    table[:, 0, 0] = torch.tensor([1.0, 3.0])
    assert step_with(table, decides_on_host=True) == 1.5
    with pytest.raises(RuntimeError, match="meta"):
        step_with(table.to("meta"), decides_on_host=True)
