"""A closer look at what was found: which operators make a size slower, and one batch divided differently.

Each has a budget of its own and ends with it, finished or not: the recommendation stands without them. What is
foreseen to take longer is not begun.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.tune.ledger import Size
from launcher.tune.operators import Profiled, grown, worth_profiling
from launcher.tune.splits import ways
from launcher.tune.survey import Survey, Term

__all__ = ["look_closer"]

OPERATORS, SPLITS = 0.15, 0.15  # of the seconds that searching has, on top of them
ROUNDS = 4  # in which each split is timed, at most
LEAST_ROUNDS = 2  # there and back, so that a drift favours none
UPDATES = 7  # that a visit takes at least: the rehearsal, two to warm up, four that count


def look_closer(survey: Survey, term: Term, accumulation: int) -> None:
    """Every rank calls it. `accumulation`: micro-batches of an update where it is not divided further."""
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
    """Whether the time would do for a short visit of each. A size whose time is not known is let pass."""
    return UPDATES * sum(sum(one.stages_ms.values()) for one in visits) <= 1e3 * term.budget_s


def _operators(survey: Survey, term: Term) -> None:
    """Where a larger size is slower and its operators can be why: both sizes profiled, outside all timing."""
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
    """The smallest micro-batches first, for what a larger one leaves behind in a CPU's memory would count as theirs."""
    for turn in range(ROUNDS):
        for size, accumulation in divisions if turn % 2 else reversed(divisions):
            if term.over():
                return
            survey.split(size, accumulation)
        if turn + 1 >= LEAST_ROUNDS and not any(one.fits and one.loose for one in survey.ledger.divisions()):
            return
