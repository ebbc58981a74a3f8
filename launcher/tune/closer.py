"""Follow-up measurements: which operators make a size slower, and the same batch at different accumulation.

Each has its own time budget and stops when it is used up, finished or not; the recommendation does not depend on them.
A follow-up that is predicted to exceed its budget is not started.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.tune.ledger import Size
from launcher.tune.operators import Profiled, grown, worth_profiling
from launcher.tune.splits import ways
from launcher.tune.survey import Survey, Term

__all__ = ["look_closer"]

OPERATORS, SPLITS = 0.15, 0.15  # shares of the search budget, added to it
ROUNDS = 4  # maximum number of rounds in which each split is timed
LEAST_ROUNDS = 2  # once in each order, so that drift favours no split
UPDATES = 7  # minimum per measurement: the dry run, two warm-up updates, four timed ones


def look_closer(survey: Survey, term: Term, accumulation: int) -> None:
    """Run the follow-ups; every rank calls it. `accumulation`: micro-batches per update without further splitting."""
    survey.closing()
    _operators(survey, term.part(OPERATORS))
    advice = survey.ledger.advice()
    if advice is None:
        return
    share = term.part(SPLITS)
    divisions, whole = ways(advice.recommended, accumulation), survey.ledger.at(advice.recommended)
    if whole is not None and _affordable(share, [whole] * len(divisions)):
        _splits(survey, share, divisions)


def _affordable(term: Term, visits: Iterable[Size]) -> bool:
    """Whether the budget allows a short measurement of each size. Sizes of unknown duration count as free."""
    return UPDATES * sum(sum(one.stages_ms.values()) for one in visits) <= 1e3 * term.budget_s


def _operators(survey: Survey, term: Term) -> None:
    """Profile both sizes, outside all timing, if a larger size is slower and its operators may be the cause."""
    pair = survey.ledger.slower()
    stage = None if pair is None else worth_profiling(*(one.ms_per_sample for one in pair))
    if pair is None or stage is None or not _affordable(term, pair):
        return
    seen: list[Profiled] = []
    for one in pair:
        found = None if term.over() else survey.profile(one.size, stage)
        if found is None:
            return
        seen.append(found)
    survey.explained(grown(stage, *seen))


def _splits(survey: Survey, term: Term, divisions: tuple[tuple[int, int], ...]) -> None:
    """Time the splits, smallest micro-batch first: CPU memory left by a larger one would count towards the smaller."""
    for turn in range(ROUNDS):
        for size, accumulation in divisions if turn % 2 else reversed(divisions):
            if term.over():
                return
            survey.split(size, accumulation)
        if turn + 1 >= LEAST_ROUNDS and not any(one.fits and one.loose for one in survey.ledger.divisions()):
            return
