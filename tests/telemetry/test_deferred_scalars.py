"""Values on the device are read later, without waiting."""

from __future__ import annotations

import pytest
import torch

from launcher.telemetry.deferred_scalars import DeferredScalars, UpdateScalars


def test_deferred_scalars_are_read_later() -> None:
    deferred = DeferredScalars(
        UpdateScalars(torch.tensor(6.0), 3, torch.tensor(1.0), torch.tensor(2.5), torch.tensor(0.1), groups=2)
    )
    assert deferred.read() == UpdateScalars(6.0, 3, 1.0, 2.5, pytest.approx(0.1), 2)
    assert DeferredScalars().read() == UpdateScalars(0.0, 0.0, 1.0, 0.0, 0.0, 0), (
        "nothing before the first update, and that was applied"
    )
