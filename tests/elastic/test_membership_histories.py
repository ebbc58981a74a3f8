"""Every short history of a job: all interleavings of births, deaths, polite leaves and messages.

So are the histories in which a process is expelled, or another one takes over its slot.
"""

from __future__ import annotations

import pytest

from launcher.elastic.membership import MembershipLimits
from tests.helpers.membership_model import FAULTS, Action, JobModel, World, ends_well


def search_histories(model: JobModel, start: World) -> int:
    """Visit every state that can be reached, and check that each history without further faults ends well.

    Returns the number of states. Without faults there must be no cycle, so that every order of steps comes to an end.
    """
    worlds, indices = [start], {start: 0}
    origins: list[tuple[int, Action]] = [(0, ("start", 0, False))]
    steps: list[list[int]] = []
    for number, world in enumerate(worlds):  # grows while it is read
        steps.append([])
        for action in model.list_actions(world):
            try:
                following = model.perform(world, action)
            except AssertionError as error:
                pytest.fail(f"{error} after {[*trace_history(origins, number), action]}")
            index = indices.setdefault(following, len(worlds))
            if index == len(worlds):
                worlds.append(following)
                origins.append((number, action))
            if action[0] not in FAULTS:
                steps[number].append(index)
        if not steps[number]:
            assert ends_well(model, world), f"no progress after {trace_history(origins, number)}: {world}"
    assert not has_cycle(steps)
    return len(worlds)


def trace_history(origins: list[tuple[int, Action]], number: int) -> list[Action]:
    """Return the actions that led to a state first."""
    actions: list[Action] = []
    while number:
        number, action = origins[number]
        actions.append(action)
    return actions[::-1]


def has_cycle(steps: list[list[int]]) -> bool:
    """Whether a graph, given as the successors of each node, has a cycle."""
    entering = [0] * len(steps)
    for successors in steps:
        for node in successors:
            entering[node] += 1
    free = [node for node, count in enumerate(entering) if not count]
    removed = 0
    while free:
        removed += 1
        for node in steps[free.pop()]:
            entering[node] -= 1
            if not entering[node]:
                free.append(node)
    return removed < len(steps)


#: First workers, births, deaths, polite leaves, and what else differs.
SEARCHES = {
    "hold": (3, 2, 2, 0, {}, {}),
    "scale": (3, 1, 2, 0, {"wait_s": 10.0}, {}),
    "fewest workers": (3, 1, 2, 0, {"min_workers": 2}, {}),
    "most workers": (2, 2, 1, 0, {"max_workers": 2}, {"most_living": 4}),
    "stopped processes": (3, 1, 1, 0, {}, {"stops": True}),
    "replaced processes": (2, 2, 1, 0, {}, {"replaces": True, "stops": True}),
    "replaced processes, scale": (2, 1, 1, 0, {"wait_s": 10.0}, {"replaces": True}),
    "replaced processes, end of training": (2, 1, 1, 0, {}, {"replaces": True, "finishes": True}),
    "replaced processes, polite leaves": (2, 1, 1, 1, {}, {"replaces": True}),
    "end of training": (2, 1, 1, 0, {}, {"finishes": True}),
    "polite leaves": (3, 1, 1, 1, {}, {}),
    "everybody leaves": (2, 1, 1, 2, {"max_workers": 2, "wait_s": 10.0}, {}),
    "one worker leaves": (1, 2, 1, 1, {"max_workers": 1}, {}),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_history_keeps_the_rules_and_ends_in_one_round(name: str) -> None:
    workers, births, deaths, leaves, limits, variant = SEARCHES[name]
    model = JobModel(MembershipLimits(expected=workers, **limits), **variant)
    start = model.start(workers, births=births, deaths=deaths, leaves=leaves)
    assert search_histories(model, start) > 500
