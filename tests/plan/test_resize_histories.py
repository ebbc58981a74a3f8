"""Random histories of a run: in any case every sample of every epoch counts exactly once, in order."""

from __future__ import annotations

import hashlib
import random

import pytest

from launcher.plan.batch import BatchPolicy, plan_batch
from launcher.plan.sample_order import SamplePermutation
from launcher.plan.timeline import Position, Timeline, Update

SIZE, EPOCHS, SEED = 203, 4, 7
POLICIES = {
    "hold": BatchPolicy(kind="hold", per_device=9, global_batch=50),
    "scale": BatchPolicy(kind="scale", per_device=7, accumulation=2),
    "bounded": BatchPolicy(kind="bounded", per_device=6, min_global=16, max_global=40),
}


ORDERS = {epoch: SamplePermutation(SIZE, SEED, epoch)[0:SIZE] for epoch in range(EPOCHS)}


def make_timeline(policy: str, world: int, tail: str = "flush") -> Timeline:
    plan = plan_batch(POLICIES[policy], world)
    return Timeline(SIZE, SIZE * EPOCHS, ((0, plan),), tail)  # type: ignore[arg-type]


def list_samples(update: Update, world: int) -> list[tuple[int, int]]:
    """Return (epoch, sample) of an update over all ranks, rank by rank; padding is ignored."""
    return [
        (epoch, ORDERS[epoch][index])
        for rank in range(world)
        for micro in update.micro_batches(rank)
        if not micro.is_padding
        for epoch, start, stop in micro.spans
        for index in range(start, stop)
    ]


def simulate_history(policy: str, tail: str, seed: int) -> list[tuple[int, int]]:
    """Return the samples that count after a random history of stops, kills, growth and shrinking."""
    rng = random.Random(seed)
    position, saved, counted, kept = Position(), Position(), 0, 0
    samples: list[tuple[int, int]] = []
    while position.samples < SIZE * EPOCHS:
        world = rng.randint(1, 8)
        for update in make_timeline(policy, world, tail).iter_updates(position):
            samples[counted:] = list_samples(update, world)
            position, counted = update.next_position, len(samples)
            event = rng.random()
            if event < 0.2:  # a checkpoint
                saved, kept = position, counted
            if event < 0.05:  # a stop request, or a joining node: a checkpoint was saved
                break
            if event > 0.93:  # a kill: back to the checkpoint; what came after it does not count
                position, counted = saved, kept
                del samples[counted:]
                break
    return samples


ONCE = [(epoch, ORDERS[epoch][index]) for epoch in range(EPOCHS) for index in range(SIZE)]


@pytest.mark.parametrize("tail", ["flush", "carry"])
@pytest.mark.parametrize("policy", POLICIES)
def test_random_resizes_and_kills_take_samples_once(policy: str, tail: str) -> None:
    for seed in range(50):
        assert simulate_history(policy, tail, seed) == ONCE, f"history {seed}"


def test_hold_order_is_equal_at_any_world_size() -> None:
    """Under hold the updates are identical; a hash over all of them is the same for 1 to 8 workers."""
    hashes = set()
    for world in range(1, 9):
        digest = hashlib.sha256()
        for update in make_timeline("hold", world).iter_updates(Position()):
            digest.update(repr((update.index, list_samples(update, world))).encode())
        hashes.add(digest.hexdigest())
    assert len(hashes) == 1
