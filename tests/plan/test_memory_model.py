"""Memory of the model state per worker: ZeRO's arithmetic, in bytes."""

from __future__ import annotations

import pytest

from launcher.plan.memory_model import LAYOUTS, ModelSize, estimate_memory, format_memory_lines, make_memory_document

#: 7.5 billion parameters under AdamW in fp32, the model of the ZeRO paper's figure 1: 4 + 4 + 8 bytes a parameter.
PAPER = ModelSize(trainable=7_500_000_000, frozen=0, element_bytes=4, slots=2)


@pytest.mark.parametrize(
    ("layout", "gigabytes"),
    [("ddp", 120.0), ("fsdp", 120 / 64), ("zero0", 120.0), ("zero1", 30 + 120 / 64 + 2)],
)
def test_estimate_matches_zero_paper_on_64_workers(layout: str, gigabytes: float) -> None:
    assert estimate_memory(PAPER, layout, 64).total == pytest.approx(gigabytes * 1e9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_worker_holds_the_full_state(layout: str) -> None:
    found = estimate_memory(PAPER, layout, 1)
    assert (found.gradients, found.optimizer, found.buffers) == (30_000_000_000, 60_000_000_000, 0)


@pytest.mark.parametrize("layout", [name for name, sharding in LAYOUTS.items() if sharding.optimizer])
def test_memory_per_worker_never_grows_with_workers(layout: str) -> None:
    totals = [estimate_memory(PAPER, layout, world).total for world in range(2, 65)]
    assert totals == sorted(totals, reverse=True)


def test_frozen_parameters_have_no_gradient_or_state() -> None:
    found = estimate_memory(ModelSize(trainable=10, frozen=90, element_bytes=4, slots=2), "ddp", 4)
    assert (found.parameters, found.gradients, found.optimizer) == (400, 40, 80)


def test_memory_table_fits_80_columns() -> None:
    lines = list(format_memory_lines(make_memory_document(PAPER, [1, 8, 64])))
    assert max(map(len, lines)) <= 80
    assert lines[-1].split()[0] == "64"
