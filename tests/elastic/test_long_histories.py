"""Long histories of a job with many births, deaths, expulsions, replacements and polite leaves, chosen at random."""

from __future__ import annotations

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from launcher.elastic.membership import MembershipLimits
from tests.helpers.membership_model import FAULTS, Action, JobModel, World, ends_well

MOST_STEPS = 200  # by then every job has come to rest


class LongHistory(RuleBasedStateMachine):
    """A job to which faults happen; the model checks each round, and at the end the job must come to rest."""

    world: World | None = None
    model: JobModel

    @initialize(
        workers=st.integers(1, 4),
        min_workers=st.integers(1, 2),
        spare=st.none() | st.integers(0, 2),
        wait_s=st.sampled_from((0.0, 10.0)),
    )
    def start(self, workers: int, min_workers: int, spare: int | None, wait_s: float) -> None:
        most = None if spare is None else max(workers, min_workers) + spare
        limits = MembershipLimits(workers, min(workers, min_workers), most, wait_s)
        self.model = JobModel(limits, most_living=6, stops=True, replaces=True)
        self.world = self.model.start(workers, births=30, deaths=25, leaves=10)

    @precondition(lambda self: self.world is not None)
    @rule(data=st.data())
    def suffer_fault(self, data: st.DataObject) -> None:
        faults = [action for action in self.list_actions() if action[0] in FAULTS]
        if faults:
            self.perform(data.draw(st.sampled_from(faults)))

    @precondition(lambda self: self.world is not None)
    @rule(data=st.data(), count=st.integers(1, 8))
    def go_on(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            if steps := self.list_steps():
                self.perform(data.draw(st.sampled_from(steps)))

    @precondition(lambda self: self.world is not None)
    @rule()
    def settle(self) -> None:
        """Nothing happens to the job for a while."""
        for _ in range(MOST_STEPS):
            steps = self.list_steps()
            if not steps:
                break
            self.perform(steps[0])
        assert not steps, "the job does not come to rest"
        assert self.world is not None
        assert ends_well(self.model, self.world), self.world

    def list_actions(self) -> list[Action]:
        assert self.world is not None
        return self.model.list_actions(self.world)

    def list_steps(self) -> list[Action]:
        return [action for action in self.list_actions() if action[0] not in FAULTS]

    def perform(self, action: Action) -> None:
        assert self.world is not None
        self.world = self.model.perform(self.world, action)

    def teardown(self) -> None:
        if self.world is not None:
            self.settle()


#: Without shrinking, which takes minutes: `test_membership_histories` finds the shortest history of a mistake.
LongHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=100, phases=(Phase.generate,))
TestLongHistory = LongHistory.TestCase
