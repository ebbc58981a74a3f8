"""Follow-up measurements: which operators make a size slower, and the same batch at different accumulation.

Each has its own time budget and stops when it is used up, finished or not; the recommendation does not depend on them.
A follow-up that is predicted to exceed its budget is not started.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.tune.measurements import SizeResult
from launcher.tune.operators import OperatorProfile, choose_stage_to_profile, find_grown_operators
from launcher.tune.search_loop import SizeSearch, TimeBudget
from launcher.tune.size_search import MIN_SIZE

__all__ = ["accumulation_splits", "run_followups"]

OPERATORS_BUDGET_SHARE, SPLITS_BUDGET_SHARE = 0.15, 0.15  # shares of the search budget, added to it
MAX_SPLIT_ROUNDS = 4  # maximum number of rounds in which each split is timed
MIN_SPLIT_ROUNDS = 2  # once in each order, so that drift favours no split
MIN_UPDATES_PER_MEASUREMENT = 7  # minimum per measurement: the dry run, two warm-up updates, four timed ones
SPLIT_DIVISORS = (1, 2, 4)
MAX_ROUNDING_DISTANCE = 1 / 8  # relative distance; a divisible size this close below is used instead


def run_followups(search: SizeSearch, budget: TimeBudget, accumulation: int) -> None:
    """Run the follow-ups; every rank calls it. `accumulation`: micro-batches per update without further splitting."""
    search.begin_followups()
    _profile_operators(search, budget.make_part(OPERATORS_BUDGET_SHARE))
    advice = search.measurements.make_advice()
    if advice is None:
        return
    splits_budget = budget.make_part(SPLITS_BUDGET_SHARE)
    splits = accumulation_splits(advice.recommended, accumulation)
    whole = search.measurements.find_size(advice.recommended)
    if whole is not None and _fits_budget(splits_budget, [whole] * len(splits)):
        _measure_splits(search, splits_budget, splits)


def accumulation_splits(size: int, accumulation: int = 1) -> tuple[tuple[int, int], ...]:
    """The (per_device, accumulation) of the same batch whole, in halves and in quarters, where these are exact.

    An odd size is replaced by the nearest divisible one below. Micro-batches of one sample, which normalisation layers
    reject, are left out. Empty if there is nothing to compare.
    """
    whole = _round_to_divisible(size)
    splits = [(whole // parts, accumulation * parts) for parts in SPLIT_DIVISORS if not whole % parts]
    splits = [split for split in splits if split[0] >= MIN_SIZE]
    return tuple(splits) if len(splits) > 1 else ()


def _round_to_divisible(size: int) -> int:
    """The nearest size below that is divisible by four, else by two, if close enough; else the size itself."""
    return next((size - size % parts for parts in (4, 2) if size % parts <= MAX_ROUNDING_DISTANCE * size), size)


def _fits_budget(budget: TimeBudget, results: Iterable[SizeResult]) -> bool:
    """Whether the budget allows a short measurement of each size. Sizes of unknown duration count as free."""
    update_ms = sum(sum(result.stages_ms.values()) for result in results)
    return MIN_UPDATES_PER_MEASUREMENT * update_ms <= 1e3 * budget.budget_s


def _profile_operators(search: SizeSearch, budget: TimeBudget) -> None:
    """Profile both sizes, outside all timing, if a larger size is slower and its operators may be the cause."""
    pair = search.measurements.find_regression()
    stage = None if pair is None else choose_stage_to_profile(*(result.ms_per_sample for result in pair))
    if pair is None or stage is None or not _fits_budget(budget, pair):
        return
    profiles: list[OperatorProfile] = []
    for result in pair:
        profile = None if budget.is_used_up() else search.profile_size(result.size, stage)
        if profile is None:
            return
        profiles.append(profile)
    search.record_operators(find_grown_operators(stage, *profiles))


def _measure_splits(search: SizeSearch, budget: TimeBudget, splits: tuple[tuple[int, int], ...]) -> None:
    """Time the splits, smallest micro-batch first: CPU memory left by a larger one would count towards the smaller."""
    for turn in range(MAX_SPLIT_ROUNDS):
        for size, accumulation in splits if turn % 2 else reversed(splits):
            if budget.is_used_up():
                return
            search.measure_split(size, accumulation)
        results = search.measurements.split_results()
        if turn + 1 >= MIN_SPLIT_ROUNDS and not any(result.fits and result.is_uncertain for result in results):
            return
