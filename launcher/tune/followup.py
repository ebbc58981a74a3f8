"""Follow-up measurements: which operators make a size slower, and the same batch at different accumulation.

Each has its own time budget and stops when it is used up, finished or not; the recommendation does not depend on them.
A follow-up that is predicted to exceed its budget is not started.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.tune.accumulation import accumulation_splits
from launcher.tune.measurements import SizeResult
from launcher.tune.operators import OperatorProfile, choose_stage_to_profile, find_grown_operators
from launcher.tune.search_loop import SizeSearch, TimeBudget

__all__ = ["run_followups"]

OPERATORS_BUDGET_SHARE, SPLITS_BUDGET_SHARE = 0.15, 0.15  # shares of the search budget, added to it
MAX_SPLIT_ROUNDS = 4  # maximum number of rounds in which each split is timed
MIN_SPLIT_ROUNDS = 2  # once in each order, so that drift favours no split
MIN_UPDATES_PER_MEASUREMENT = 7  # minimum per measurement: the dry run, two warm-up updates, four timed ones


def run_followups(search: SizeSearch, budget: TimeBudget, accumulation: int) -> None:
    """Run the follow-ups; every rank calls it. `accumulation`: micro-batches per update without further splitting."""
    search.begin_followups()
    _profile_operators(search, budget.make_part(OPERATORS_BUDGET_SHARE))
    advice = search.measurements.make_advice()
    if advice is None:
        return
    share = budget.make_part(SPLITS_BUDGET_SHARE)
    divisions, whole = (
        accumulation_splits(advice.recommended, accumulation),
        search.measurements.find_size(advice.recommended),
    )
    if whole is not None and _fits_budget(share, [whole] * len(divisions)):
        _measure_splits(search, share, divisions)


def _fits_budget(budget: TimeBudget, visits: Iterable[SizeResult]) -> bool:
    """Whether the budget allows a short measurement of each size. Sizes of unknown duration count as free."""
    return MIN_UPDATES_PER_MEASUREMENT * sum(sum(one.stages_ms.values()) for one in visits) <= 1e3 * budget.budget_s


def _profile_operators(search: SizeSearch, budget: TimeBudget) -> None:
    """Profile both sizes, outside all timing, if a larger size is slower and its operators may be the cause."""
    pair = search.measurements.find_regression()
    stage = None if pair is None else choose_stage_to_profile(*(one.ms_per_sample for one in pair))
    if pair is None or stage is None or not _fits_budget(budget, pair):
        return
    seen: list[OperatorProfile] = []
    for one in pair:
        found = None if budget.is_used_up() else search.profile_size(one.size, stage)
        if found is None:
            return
        seen.append(found)
    search.record_operators(find_grown_operators(stage, *seen))


def _measure_splits(search: SizeSearch, budget: TimeBudget, divisions: tuple[tuple[int, int], ...]) -> None:
    """Time the splits, smallest micro-batch first: CPU memory left by a larger one would count towards the smaller."""
    for turn in range(MAX_SPLIT_ROUNDS):
        for size, accumulation in divisions if turn % 2 else reversed(divisions):
            if budget.is_used_up():
                return
            search.measure_split(size, accumulation)
        if turn + 1 >= MIN_SPLIT_ROUNDS and not any(
            one.fits and one.is_uncertain for one in search.measurements.split_results()
        ):
            return
