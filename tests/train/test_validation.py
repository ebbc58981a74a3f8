"""Chunks of the validation data."""

from __future__ import annotations

from typing import Any

import pytest


# Validation
@pytest.mark.parametrize("size", [3, 8, 53])
def test_validation_chunks_are_independent_of_world_size(size: int) -> None:
    from launcher.train.validation import ValidationSampler

    def batches(world: int) -> list[Any]:
        slices = [ValidationSampler(size, rank, world, chunks=8, batch=5) for rank in range(world)]
        return [b for one in slices for b in zip(one.chunks, one, strict=True) if b[0] is not None]

    assert batches(1) == batches(2) == batches(3) == batches(11)
    assert sorted(sample for _, batch in batches(1) for _, sample in batch) == list(range(size))
