"""The statistics of all ranks: what each update compares."""

from __future__ import annotations

import math

import pytest
import torch

from launcher.distributed.rank_stats import GatheredStats, PendingStats, RankStats, sum_loss_counts
from launcher.errors import TrainingFailed
from launcher.plan.virtual_shards import compute_tree_sum
from launcher.telemetry.stages import STAGES
from launcher.telemetry.stats_fields import NUM_STATS
from launcher.telemetry.update_scalars import UpdateScalars

CPU = torch.device("cpu")


def test_each_number_of_a_row_comes_back_under_its_name() -> None:
    scalars = UpdateScalars(torch.tensor(6.0), 3, torch.tensor(True), torch.tensor(2.5), torch.tensor(0.25), groups=2)
    stages_ms = [float(index) for index in range(len(STAGES))]
    stats = RankStats(count=7.0, stop=1.0, save=1.0, call_order=4294967295.0, previous=scalars, stages_ms=stages_ms)
    row = stats.to_row(CPU)
    assert len(row) == NUM_STATS
    gathered = PendingStats(torch.tensor([[row], [row]], dtype=torch.float64)).read()
    assert (gathered.count, gathered.stop, gathered.save, gathered.world) == (14, 1, True, 2)
    gathered.check_call_order()
    assert (gathered.loss, gathered.loss_count, gathered.finite, gathered.grad_norm) == (12, 6, True, 2.5)
    assert (gathered.group_sq_norm_sum, gathered.groups) == (0.5, 4)
    assert gathered.stages_ms == [stages_ms] * 2


def test_loss_count_is_summed_on_the_device() -> None:
    words = [[RankStats(count=2.0**40).to_row(CPU), RankStats(count=1).to_row(CPU)]]
    words += [[RankStats(count=2.5).to_row(CPU), RankStats().to_row(CPU)]]
    table = torch.tensor(words, dtype=torch.float64)
    assert float(sum_loss_counts(table)) == 2.0**40 + 3.5 == GatheredStats(table).count


def test_one_rank_that_is_not_finite_skips_the_update_for_all() -> None:
    bad = UpdateScalars(loss=math.nan, finite=torch.tensor(False))
    gathered = GatheredStats.from_ranks([RankStats(), RankStats(previous=bad)])
    assert (gathered.finite, gathered.not_finite) == (False, (1,))


def test_different_orders_of_calls_end_training() -> None:
    ranks = [RankStats(call_order=order) for order in (3.0, 3.0, 5.0)]
    GatheredStats.from_ranks(ranks[:2]).check_call_order()
    with pytest.raises(TrainingFailed, match="called different parts of the model, or in another order"):
        GatheredStats.from_ranks(ranks).check_call_order()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loss_counts_that_are_not_whole_are_summed_in_the_same_order_at_any_number_of_ranks(ranks: int) -> None:
    """Exact mode: each rank's count is the tree sum of its shards', and the sum over ranks continues that tree."""
    torch.manual_seed(0)
    for shards in torch.rand(200, 8, dtype=torch.float64):
        counts = [compute_tree_sum(part.tolist()) for part in shards.split(8 // ranks)]
        table = torch.tensor([[RankStats(count=count).to_row(CPU)] for count in counts], dtype=torch.float64)
        expected = compute_tree_sum(shards.tolist())
        assert float(sum_loss_counts(table)) == GatheredStats(table).count == expected


def test_statistics_of_many_ranks_are_read_like_those_of_few() -> None:
    ranks = [RankStats(count=rank, stop=2.0 * (rank == 70), save=float(rank == 3)) for rank in range(100)]
    ranks[50] = RankStats(previous=UpdateScalars(finite=0.0))
    few, many = GatheredStats.from_ranks(ranks[:16]), GatheredStats.from_ranks(ranks)
    assert (few.count, few.stop, few.save, few.finite) == (120, 0, True, True)
    assert (many.count, many.stop, many.save, many.finite) == (4950 - 50, 2, True, False)
    many.check_call_order()
    assert (many.not_finite, len(many.stages_ms)) == ((), 100)
