"""The statistics of all ranks: what each update compares."""

from __future__ import annotations

import pytest

from launcher.distributed.rank_stats import GatheredStats, RankStats
from launcher.errors import TrainingFailed


def test_statistics_survive_the_way_as_numbers() -> None:
    stats = RankStats(count=7.0, stop=1.0, save=1.0, call_order=4294967295.0)
    assert RankStats.from_row(stats.to_row()) == stats


def test_different_orders_of_calls_end_training() -> None:
    ranks = tuple(RankStats(call_order=order) for order in (3.0, 3.0, 5.0))
    GatheredStats(ranks[:2], ()).check_call_order()
    with pytest.raises(TrainingFailed, match="called different parts of the model, or in another order"):
        GatheredStats(ranks, ()).check_call_order()
