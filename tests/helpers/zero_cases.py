"""The code of every rank in test_deepspeed.py: each case is a function, each outcome a line of JSON.

`python -m torch.distributed.run … zero_cases.py FOLDER`: outcomes go to FOLDER/outcomes-<world>.json, and the state
that is passed between world sizes is in FOLDER too.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.checkpoint.tensor_io import LazyTensors
from launcher.config.schema import LaunchConfig, LrConfig, RunConfig, StrategyConfig, TrainConfig
from launcher.errors import UsageError
from launcher.strategies.interface import ReplicaArgs, ReplicaProtocol, ReplicaState
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import HostTimer, StageClock

BATCH = 12
OPTIMIZERS = {
    "sgd": {"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"_target_": "torch.optim.AdamW", "weight_decay": 0.1},
}


class Odd(nn.Module):
    """Sizes that no world size divides, a tied and a frozen parameter, and buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.into = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.fixed = nn.Linear(13, 13)
        self.out = nn.Linear(13, 7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        for parameter in self.fixed.parameters():
            parameter.requires_grad = False

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean += 0.1 * (words.float().mean() - self.mean)
            self.calls += 1
        hidden = torch.relu(self.norm(self.into(self.embed(words))))
        return self.head(self.out(torch.tanh(self.fixed(hidden))))


def run_of(optimizer: str, precision: str = "fp32", **strategy: Any) -> RunConfig:
    return RunConfig(
        optimizer=OPTIMIZERS[optimizer],
        lr=LrConfig(base=0.1),
        train=TrainConfig(precision=precision),
        strategy=StrategyConfig(**strategy),
    )


def made(config: RunConfig, world: int) -> ReplicaProtocol:
    torch.manual_seed(1)
    precision = Precision.from_name(config.train.precision, torch.device("cpu"))
    return build_replica(ReplicaArgs(Odd().train(), config, world, precision, StageClock(HostTimer())))


def samples(update: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(update)
    words = torch.randint(0, 11, (2, BATCH), generator=generator)
    return words[0], words[1]


def shares(world: int, even: bool) -> list[int]:
    """Even shares, or one more micro-batch on the first rank and none on the last."""
    if even or world == 1:
        return [BATCH // world] * world
    return [BATCH] + [0] * (world - 1) if world == 2 else [BATCH - 2, 2, 0]


def micro_batches(world: int, even: bool, per_device: int, padded: bool) -> list[list[tuple[int, int]]]:
    """Return (start, stop) of the micro-batches of each rank; an empty one is padding."""
    parts, start = [], 0
    for share in shares(world, even):
        stop = start + share
        parts.append([(at, min(at + per_device, stop)) for at in range(start, stop, per_device)])
        start = stop
    longest = max(len(part) for part in parts) if padded else 1
    return [part + [(0, 0)] * (longest - len(part)) for part in parts]


def trained(
    replica: ReplicaProtocol,
    updates: range,
    *,
    world: int,
    even: bool = True,
    padded: bool = True,
    poison: tuple[int, int] | None = None,
    rescale: float = 1.0,
    clip_norm: float | None = None,
    precision: Precision | None = None,
) -> list[tuple[float, bool]]:
    """Train this rank's share as the loop does; return the norms, and whether each update was applied.

    A pad's loss is always NaN. `poison`: the update and rank whose loss is.
    """
    rank = dist.get_rank() if world > 1 else 0
    steps = []
    for update in updates:
        words, next_words = samples(update)
        parts = micro_batches(world, even, 5, padded)[rank]
        for index, (start, stop) in enumerate(parts):
            pad = start == stop
            chosen = slice(0, 1) if pad else slice(start, stop)
            with replica.micro_batch(last=index == len(parts) - 1, pad=pad, place=rank):
                with precision.autocast() if precision else torch.autocast("cpu", enabled=False):
                    total = cross_entropy(replica.model(words[chosen]).float(), next_words[chosen], reduction="sum")
                if pad or poison == (update, rank):
                    total = total * math.nan
                replica.backward(total, BATCH)
        step = replica.step(0.02, None, rescale, clip_norm)
        steps.append((float(step.norm), bool(step.finite)))
    return steps


def state_of(replica: ReplicaProtocol) -> ReplicaState:
    """Broadcast rank 0's tensors to every rank, in separate memory."""
    model, optimizer, facts = replica.full_state()
    copies = [{name: tensor.detach().clone() for name, tensor in part.items()} for part in (model, optimizer)]
    held = [ReplicaState(copies[0], copies[1], json.loads(json.dumps(facts)))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def put_together(replica: ReplicaProtocol, world: int) -> ReplicaState:
    """Assemble the state from the parts of all ranks."""
    (model, optimizer, facts), places = replica.sharded_state()
    own = [{name: tensor.detach().clone() for name, tensor in part.items()} for part in (model, optimizer)]
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (own, places))
    whole: list[dict[str, torch.Tensor]] = [{}, {}]
    for parts, where in told:
        for known, part in zip(whole, parts, strict=True):
            for name, tensor in part.items():
                if name in where:
                    place = where[name]
                    flat = known.setdefault(name, torch.full(place.shape, math.nan).to(tensor.dtype)).view(-1)
                    flat[place.start : place.start + tensor.numel()] = tensor
                else:
                    assert name not in known, "two ranks have it"
                    known[name] = tensor
    return ReplicaState(*whole, json.loads(json.dumps(facts)))


def give(replica: ReplicaProtocol, state: ReplicaState) -> None:
    """Load lazily as from a checkpoint: a tensor, or a part of one, exists once it is requested."""
    replica.restore(stored(state.model), stored(state.optimizer), state.facts)


def stored(tensors: Mapping[str, torch.Tensor]) -> LazyTensors:
    def read(facts: Mapping[str, Any], start: int = 0, stop: int | None = None) -> torch.Tensor:
        assert stop is None or start < stop, "no file is opened for nothing"
        return tensors[facts["name"]].reshape(-1)[start:stop].clone()

    return LazyTensors(read, {n: {"name": n, "shape": list(t.shape), "aliases": []} for n, t in tensors.items()})


def furthest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Exclude buffers: they depend on what a rank saw of the batch."""
    assert one.keys() == other.keys()
    names = one.keys() - {"mean", "calls"}
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in names)


def same_bits(one: ReplicaState, other: ReplicaState) -> None:
    for here, there in zip(one[:2], other[:2], strict=True):
        assert here.keys() == there.keys(), here.keys() ^ there.keys()
        for name, tensor in here.items():
            twin = there[name]
            assert (tensor.shape, tensor.dtype) == (twin.shape, twin.dtype), name
            assert tensor.numpy().tobytes() == twin.numpy().tobytes(), name
    assert one[2] == other[2]


# The cases


@cache
def on_one_worker(optimizer: str) -> tuple[list[tuple[float, bool]], ReplicaState]:
    """The DDP result, with the last ten updates clipped."""
    plain = made(run_of(optimizer), 1)
    steps = trained(plain, range(10), world=1) + trained(plain, range(10, 20), world=1, clip_norm=0.4)
    return steps, state_of(plain)


def as_ddp_on_one_worker(world: int, settings: dict[str, Any], optimizer: str, even: bool) -> None:
    replica = made(run_of(optimizer, **settings), world)
    how: dict[str, Any] = {"world": world, "even": even, "padded": settings["stage"] >= 2}
    steps = trained(replica, range(10), **how) + trained(replica, range(10, 20), clip_norm=0.4, **how)
    wanted, there = on_one_worker(optimizer)
    here = state_of(replica)
    for (norm, applied), (right, _) in zip(steps, wanted, strict=True):
        assert applied
        assert abs(norm - right) < 1e-4 * right, (norm, right)
    assert furthest(here.model, there.model) <= 1e-5, furthest(here.model, there.model)
    assert furthest(here.optimizer, there.optimizer) <= 1e-4, furthest(here.optimizer, there.optimizer)
    assert here.facts == there.facts


def not_finite(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """A NaN in the loss of one rank: no rank changes anything, and the next update is unaffected."""
    config = run_of(optimizer, **settings)
    replica, untroubled = made(config, world), made(config, world)
    trained(replica, range(3), world=world)
    trained(untroubled, range(3), world=world)
    before = state_of(replica)
    (norm, applied), *_ = trained(replica, range(3, 4), world=world, poison=(3, world - 1))
    assert not applied
    assert not math.isfinite(norm)
    same_bits(before, state_of(replica))
    assert trained(replica, range(4, 7), world=world) == trained(untroubled, range(4, 7), world=world)
    same_bits(state_of(untroubled), state_of(replica))


def not_finite_at_first(world: int, settings: dict[str, Any], optimizer: str) -> None:
    config = run_of(optimizer, **settings)
    replica = made(config, world)
    before = state_of(replica)
    assert not trained(replica, range(1), world=world, poison=(0, 0))[0][1]
    same_bits(before, state_of(replica))


def rescaled(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """Equal to the gradients of plain torch times 1.7, for norm and clipping; NaN (zero count) skips."""
    config = run_of(optimizer, **settings)
    replica, plain = made(config, world), made(run_of(optimizer), 1)
    steps = trained(replica, range(6), world=world, rescale=1.7, clip_norm=1.0)
    wanted = trained(plain, range(6), world=1, rescale=1.7, clip_norm=1.0)
    for (norm, _), (right, _) in zip(steps, wanted, strict=True):
        assert abs(norm - right) < 1e-4 * right, (norm, right)
    before = state_of(replica)
    assert not trained(replica, range(6, 7), world=world, rescale=math.nan)[0][1]
    same_bits(before, state_of(replica))
    assert furthest(before.model, state_of(plain).model) <= 1e-5


def goes_on(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """Saved, loaded by a new replica of the same kind, and continued: bitwise as without saving."""
    config = run_of(optimizer, **settings)
    straight, first, second = made(config, world), made(config, world), made(config, world)
    trained(straight, range(8), world=world)
    trained(first, range(4), world=world)
    give(second, state_of(first))
    same_bits(state_of(first), state_of(second))
    first.broadcast_buffers()  # as before each save
    same_bits(state_of(first), put_together(first, world))
    trained(second, range(4, 8), world=world)
    same_bits(state_of(straight), state_of(second))


def passed_on(world: int, optimizer: str, kinds: dict[str, dict[str, Any]]) -> None:
    """A state passes through every strategy and stage in sequence and keeps the same bits."""
    first = made(run_of(optimizer), 1)
    trained(first, range(5), world=1)
    state = state_of(first)
    for name, settings in kinds.items():
        replica = made(run_of(optimizer, **settings), world)
        trained(replica, range(2), world=world)  # the previous content does not remain
        fresh = made(run_of(optimizer, **settings), world)
        for taker in (fresh, replica):
            give(taker, state)
            try:
                same_bits(state, state_of(taker))
            except AssertionError as problem:
                raise AssertionError(f"{name}: {problem}") from problem
    back = made(run_of(optimizer), 1)
    give(back, state)
    same_bits(state, state_of(back))
    assert trained(back, range(5, 7), world=1) == trained(first, range(5, 7), world=1)


def from_another_world(world: int, settings: dict[str, Any], optimizer: str, file: Path) -> None:
    """The state left by another world size: loaded bitwise, trained further, and left for the next."""
    replica = made(run_of(optimizer, **settings), world)
    if file.exists():
        state = ReplicaState(*torch.load(file, weights_only=True))
        give(replica, state)
        same_bits(state, state_of(replica))
    trained(replica, range(3), world=world)
    left = state_of(replica)
    if dist.get_rank() == 0:
        torch.save(tuple(left), file)
    dist.barrier()


def mixed_precision(world: int, settings: dict[str, Any], precision: str) -> None:
    """As under DDP in the same precision: autocast of the loss, and shrinking and saving of fp16's scale."""
    replica, plain = made(run_of("sgd", precision, **settings), world), made(run_of("sgd", precision), 1)
    cast = Precision.from_name(precision, torch.device("cpu"))
    seen: set[torch.dtype] = set()
    replica.module.into.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    for update in range(10):
        poison = (update, 0) if update == 5 else None
        steps = [
            trained(one, range(update, update + 1), world=on, precision=cast, poison=poison)[0][1]
            for one, on in ((replica, world), (plain, 1))
        ]
        assert steps[0] == steps[1], update
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    here, there = state_of(replica), state_of(plain)
    assert furthest(here.model, there.model) < 0.02, furthest(here.model, there.model)
    assert {tensor.dtype for name, tensor in here.model.items() if name != "calls"} == {torch.float32}
    assert here.facts == there.facts
    again = made(run_of("sgd", precision, **settings), world)
    give(again, here)
    same_bits(here, state_of(again))


def validated(world: int, settings: dict[str, Any]) -> None:
    """`bare` can be called between updates by all ranks, and training continues unaffected."""
    config = run_of("adamw", **settings)
    replica, undisturbed = made(config, world), made(config, world)
    for update in range(3):
        for one in (replica, undisturbed):
            trained(one, range(update, update + 1), world=world)
        replica.module.eval()
        with torch.no_grad():
            words, _ = samples(100)
            found = replica.module(words)
        replica.module.train()
        plain = Odd()
        plain.load_state_dict(dict(state_of(replica).model))
        torch.testing.assert_close(found, plain.eval()(words))
    same_bits(state_of(replica), state_of(undisturbed))


def buffers_of_rank_0(world: int, settings: dict[str, Any]) -> None:
    """Running statistics are those of rank 0 when synchronised; padding does not affect them."""
    replica = made(run_of("sgd", **settings), world)
    trained(replica, range(2), world=world, even=False)
    own = [part for part in micro_batches(world, False, 5, False)[dist.get_rank()] if part != (0, 0)]
    assert int(replica.module.calls) == 2 * len(own)
    replica.broadcast_buffers()
    first = replica.module.mean.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, replica.module.mean)


def mixed_steps(world: int, settings: dict[str, Any]) -> None:
    """A flat group has one step for all: states that cannot be represented are refused."""
    replica = made(run_of("adamw", **settings), world)
    trained(replica, range(2), world=world)
    state = state_of(replica)
    state.optimizer["out.weight/step"].fill_(7.0)
    with pytest.raises(UsageError, match="keeps one step for a group"):
        give(made(run_of("adamw", **settings), world), state)


def keeps_our_timeout(world: int, settings: dict[str, Any]) -> None:
    """DeepSpeed's process group uses our timeout, not torch's half hour."""
    made(replace(run_of("sgd", **settings), launch=LaunchConfig(timeout_s=77.0)), world)
    backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout.total_seconds() == 77


Case = tuple[str, Callable[[], None]]


def cases(world: int, folder: Path) -> Iterator[Case]:
    kinds: dict[str, dict[str, Any]] = {f"stage {n}": {"name": "deepspeed", "stage": n} for n in range(4)}
    small = folder / "small.json"
    parts = {"stage3_param_persistence_threshold": 0, "sub_group_size": 100, "reduce_bucket_size": 60}
    small.write_text(json.dumps({"zero_optimization": parts}))
    in_parts = {f"stage {n} in small parts": {**kinds[f"stage {n}"], "config": str(small)} for n in (1, 3)}
    offloaded = {f"stage {n} offloaded": {**kinds[f"stage {n}"], "offload": True} for n in (1, 2, 3)}
    every = {**kinds, **in_parts, **offloaded}
    for name, settings in every.items():
        yield from training_cases(world, name, settings, folder)
    for optimizer in OPTIMIZERS:
        yield f"passed on: {optimizer}", partial(passed_on, world, optimizer, every)
    for name, settings in {**kinds, **in_parts}.items():
        yield f"validated: {name}", partial(validated, world, settings)
        yield f"fp16: {name}", partial(mixed_precision, world, settings, "fp16")
    for name, settings in kinds.items():
        yield f"bf16: {name}", partial(mixed_precision, world, settings, "bf16")
        yield f"buffers: {name}", partial(buffers_of_rank_0, world, settings)
    yield "mixed steps", partial(mixed_steps, world, kinds["stage 2"])
    yield "timeout", partial(keeps_our_timeout, world, kinds["stage 1"])


def training_cases(world: int, name: str, settings: dict[str, Any], folder: Path) -> Iterator[Case]:
    for optimizer in OPTIMIZERS:
        yield f"as ddp: {name}, {optimizer}", partial(as_ddp_on_one_worker, world, settings, optimizer, True)
        if world > 1:
            yield f"uneven: {name}, {optimizer}", partial(as_ddp_on_one_worker, world, settings, optimizer, False)
        yield f"goes on: {name}, {optimizer}", partial(goes_on, world, settings, optimizer)
        file = folder / f"{name}-{optimizer}.pt"
        yield f"another world: {name}, {optimizer}", partial(from_another_world, world, settings, optimizer, file)
    yield f"not finite: {name}", partial(not_finite, world, settings, "adamw")
    yield f"first not finite: {name}", partial(not_finite_at_first, world, settings, "sgd")
    yield f"rescaled: {name}", partial(rescaled, world, settings, "sgd")


def main(folder: Path, chosen: str = "") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    outcomes: dict[str, str] = {}
    for name, case in cases(world, folder):
        if chosen not in name:
            continue
        try:
            case()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            if chosen:
                print(dist.get_rank(), outcomes[name], flush=True)
        told: list[Any] = [None] * world
        dist.all_gather_object(told, outcomes[name])
        outcomes[name] = next((one for one in told if one), "")
        gc.freeze()  # each stage 3 engine collects garbage, and would scan all live objects
    if dist.get_rank() == 0:
        (folder / f"outcomes-{world}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
