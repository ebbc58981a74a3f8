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
from launcher.recipe import Loss
from launcher.strategies.interface import Replica, ReplicaArgs, ReplicaState
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import HostTimer, StageClock

BATCH = 12
OPTIMIZERS = {
    "sgd": {"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"_target_": "torch.optim.AdamW", "weight_decay": 0.1},
}


class OddSizesModel(nn.Module):
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
            self.mean = self.mean + 0.1 * (words.float().mean() - self.mean)  # assigned anew
            self.calls += 1
        hidden = torch.relu(self.norm(self.into(self.embed(words))))
        return self.head(self.out(torch.tanh(self.fixed(hidden))))


def make_config(optimizer: str, precision: str = "fp32", **strategy: Any) -> RunConfig:
    return RunConfig(
        optimizer=OPTIMIZERS[optimizer],
        lr=LrConfig(base=0.1),
        train=TrainConfig(precision=precision),
        strategy=StrategyConfig(**strategy),
    )


def make_replica(config: RunConfig, world: int) -> Replica:
    torch.manual_seed(1)
    precision = Precision.from_name(config.train.precision, torch.device("cpu"))
    return build_replica(ReplicaArgs(OddSizesModel().train(), config, world, precision, StageClock(HostTimer())))


def draw_samples(update: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(update)
    words = torch.randint(0, 11, (2, BATCH), generator=generator)
    return words[0], words[1]


def split_batch(world: int, even: bool) -> list[int]:
    """Even shares, or one more micro-batch on the first rank and none on the last."""
    if even or world == 1:
        return [BATCH // world] * world
    return [BATCH] + [0] * (world - 1) if world == 2 else [BATCH - 2, 2, 0]


def split_micro_batches(world: int, even: bool, per_device: int, padded: bool) -> list[list[tuple[int, int]]]:
    """Return (start, stop) of the micro-batches of each rank; an empty one is padding."""
    parts, start = [], 0
    for share in split_batch(world, even):
        stop = start + share
        parts.append([(at, min(at + per_device, stop)) for at in range(start, stop, per_device)])
        start = stop
    longest = max(len(part) for part in parts) if padded else 1
    return [part + [(0, 0)] * (longest - len(part)) for part in parts]


def compute_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
    words, next_words = batch
    return Loss(cross_entropy(model(words).float(), next_words, reduction="sum"), len(words))


def train_updates(
    replica: Replica,
    updates: range,
    *,
    world: int,
    even: bool = True,
    padded: bool = True,
    nan_at: tuple[int, int] | None = None,
    loss_normalizer: float = 1.0,
    clip_norm: float | None = None,
    precision: Precision | None = None,
) -> list[tuple[float, bool]]:
    """Train this rank's share as the loop does; return the norms, and whether each update was applied.

    A pad's loss is always NaN. `poison`: the update and rank whose loss is.
    """
    rank = dist.get_rank() if world > 1 else 0
    steps = []
    for update in updates:
        words, next_words = draw_samples(update)
        parts = split_micro_batches(world, even, 5, padded)[rank]
        for index, (start, stop) in enumerate(parts):
            is_padding = start == stop
            chosen = slice(0, 1) if is_padding else slice(start, stop)
            with replica.micro_batch(last=index == len(parts) - 1, is_padding=is_padding, shard=rank):
                with precision.autocast() if precision else torch.autocast("cpu", enabled=False):
                    total = replica.compute_loss(compute_loss, (words[chosen], next_words[chosen])).total
                if is_padding or nan_at == (update, rank):
                    total = total * math.nan
                replica.backward(total, BATCH)
        step = replica.step(0.02, None, loss_normalizer, clip_norm)
        steps.append((float(step.norm), bool(step.finite)))
    return steps


def gather_state(replica: Replica) -> ReplicaState:
    """Broadcast rank 0's tensors to every rank, in separate memory."""
    model, optimizer, facts = replica.full_state()
    copies = [{name: tensor.detach().clone() for name, tensor in part.items()} for part in (model, optimizer)]
    held = [ReplicaState(copies[0], copies[1], json.loads(json.dumps(facts)))]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def assemble_sharded_state(replica: Replica, world: int) -> ReplicaState:
    """Assemble the state from the parts of all ranks."""
    (model, optimizer, facts), slices = replica.sharded_state()
    own = [{name: tensor.detach().clone() for name, tensor in part.items()} for part in (model, optimizer)]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (own, slices))
    whole: list[dict[str, torch.Tensor]] = [{}, {}]
    for parts, rank_slices in gathered:
        for known, part in zip(whole, parts, strict=True):
            for name, tensor in part.items():
                if name in rank_slices:
                    tensor_slice = rank_slices[name]
                    flat = known.setdefault(name, torch.full(tensor_slice.shape, math.nan).to(tensor.dtype)).view(-1)
                    flat[tensor_slice.start : tensor_slice.start + tensor.numel()] = tensor
                else:
                    assert name not in known, "two ranks have it"
                    known[name] = tensor
    return ReplicaState(*whole, json.loads(json.dumps(facts)))


def load_state(replica: Replica, state: ReplicaState) -> None:
    """Load lazily as from a checkpoint: a tensor, or a part of one, exists once it is requested."""
    replica.restore(make_lazy_tensors(state.model), make_lazy_tensors(state.optimizer), state.facts)


def make_lazy_tensors(tensors: Mapping[str, torch.Tensor]) -> LazyTensors:
    def read(facts: Mapping[str, Any], start: int = 0, stop: int | None = None) -> torch.Tensor:
        assert stop is None or start < stop, "no file is opened for nothing"
        return tensors[facts["name"]].reshape(-1)[start:stop].clone()

    return LazyTensors(read, {n: {"name": n, "shape": list(t.shape), "aliases": []} for n, t in tensors.items()})


def max_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Exclude buffers: they depend on what a rank saw of the batch."""
    assert one.keys() == other.keys()
    names = one.keys() - {"mean", "calls"}
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in names)


def assert_bitwise_equal(one: ReplicaState, other: ReplicaState) -> None:
    for result, expected in zip(one[:2], other[:2], strict=True):
        assert result.keys() == expected.keys(), result.keys() ^ expected.keys()
        for name, tensor in result.items():
            twin = expected[name]
            assert (tensor.shape, tensor.dtype) == (twin.shape, twin.dtype), name
            assert tensor.numpy().tobytes() == twin.numpy().tobytes(), name
    assert one[2] == other[2]


# The cases


@cache
def train_ddp_on_one_worker(optimizer: str) -> tuple[list[tuple[float, bool]], ReplicaState]:
    """The DDP result, with the last ten updates clipped."""
    plain = make_replica(make_config(optimizer), 1)
    steps = train_updates(plain, range(10), world=1) + train_updates(plain, range(10, 20), world=1, clip_norm=0.4)
    return steps, gather_state(plain)


def check_equal_to_ddp(world: int, settings: dict[str, Any], optimizer: str, even: bool) -> None:
    replica = make_replica(make_config(optimizer, **settings), world)
    how: dict[str, Any] = {"world": world, "even": even, "padded": settings["stage"] >= 2}
    steps = train_updates(replica, range(10), **how) + train_updates(replica, range(10, 20), clip_norm=0.4, **how)
    wanted, expected = train_ddp_on_one_worker(optimizer)
    result = gather_state(replica)
    for (norm, applied), (right, _) in zip(steps, wanted, strict=True):
        assert applied
        assert abs(norm - right) < 1e-4 * right, (norm, right)
    assert max_difference(result.model, expected.model) <= 1e-5, max_difference(result.model, expected.model)
    assert max_difference(result.optimizer, expected.optimizer) <= 1e-4, max_difference(
        result.optimizer, expected.optimizer
    )
    assert result.facts == expected.facts


def check_non_finite_update(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """A NaN in the loss of one rank: no rank changes anything, and the next update is unaffected."""
    config = make_config(optimizer, **settings)
    replica, undisturbed = make_replica(config, world), make_replica(config, world)
    train_updates(replica, range(3), world=world)
    train_updates(undisturbed, range(3), world=world)
    before = gather_state(replica)
    (norm, applied), *_ = train_updates(replica, range(3, 4), world=world, nan_at=(3, world - 1))
    assert not applied
    assert not math.isfinite(norm)
    assert_bitwise_equal(before, gather_state(replica))
    assert train_updates(replica, range(4, 7), world=world) == train_updates(undisturbed, range(4, 7), world=world)
    assert_bitwise_equal(gather_state(undisturbed), gather_state(replica))


def check_non_finite_first_update(world: int, settings: dict[str, Any], optimizer: str) -> None:
    config = make_config(optimizer, **settings)
    replica = make_replica(config, world)
    before = gather_state(replica)
    assert not train_updates(replica, range(1), world=world, nan_at=(0, 0))[0][1]
    assert_bitwise_equal(before, gather_state(replica))


def check_rescale(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """Equal to the gradients of plain torch times 1.7, for norm and clipping; NaN (zero count) skips."""
    config = make_config(optimizer, **settings)
    replica, plain = make_replica(config, world), make_replica(make_config(optimizer), 1)
    steps = train_updates(replica, range(6), world=world, loss_normalizer=1.7, clip_norm=1.0)
    wanted = train_updates(plain, range(6), world=1, loss_normalizer=1.7, clip_norm=1.0)
    for (norm, _), (right, _) in zip(steps, wanted, strict=True):
        assert abs(norm - right) < 1e-4 * right, (norm, right)
    before = gather_state(replica)
    assert not train_updates(replica, range(6, 7), world=world, loss_normalizer=math.nan)[0][1]
    assert_bitwise_equal(before, gather_state(replica))
    assert max_difference(before.model, gather_state(plain).model) <= 1e-5


def check_resume(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """Saved, loaded by a new replica of the same kind, and continued: bitwise as without saving."""
    config = make_config(optimizer, **settings)
    straight, first, second = make_replica(config, world), make_replica(config, world), make_replica(config, world)
    train_updates(straight, range(8), world=world)
    train_updates(first, range(4), world=world)
    load_state(second, gather_state(first))
    assert_bitwise_equal(gather_state(first), gather_state(second))
    first.broadcast_buffers()  # as before each save
    assert_bitwise_equal(gather_state(first), assemble_sharded_state(first, world))
    train_updates(second, range(4, 8), world=world)
    assert_bitwise_equal(gather_state(straight), gather_state(second))


def check_state_across_strategies(world: int, optimizer: str, kinds: dict[str, dict[str, Any]]) -> None:
    """A state passes through every strategy and stage in sequence and keeps the same bits."""
    first = make_replica(make_config(optimizer), 1)
    train_updates(first, range(5), world=1)
    state = gather_state(first)
    for name, settings in kinds.items():
        replica = make_replica(make_config(optimizer, **settings), world)
        train_updates(replica, range(2), world=world)  # the previous content does not remain
        fresh = make_replica(make_config(optimizer, **settings), world)
        for target in (fresh, replica):
            load_state(target, state)
            try:
                assert_bitwise_equal(state, gather_state(target))
            except AssertionError as problem:
                raise AssertionError(f"{name}: {problem}") from problem
    back = make_replica(make_config(optimizer), 1)
    load_state(back, state)
    assert_bitwise_equal(state, gather_state(back))
    assert train_updates(back, range(5, 7), world=1) == train_updates(first, range(5, 7), world=1)


def check_state_from_other_world_size(world: int, settings: dict[str, Any], optimizer: str, file: Path) -> None:
    """The state left by another world size: loaded bitwise, trained further, and left for the next."""
    replica = make_replica(make_config(optimizer, **settings), world)
    if file.exists():
        state = ReplicaState(*torch.load(file, weights_only=True))
        load_state(replica, state)
        assert_bitwise_equal(state, gather_state(replica))
    train_updates(replica, range(3), world=world)
    left = gather_state(replica)
    if dist.get_rank() == 0:
        torch.save(tuple(left), file)
    dist.barrier()


def check_mixed_precision(world: int, settings: dict[str, Any], precision: str) -> None:
    """As under DDP in the same precision: autocast of the loss, and shrinking and saving of fp16's scale."""
    replica, plain = (
        make_replica(make_config("sgd", precision, **settings), world),
        make_replica(make_config("sgd", precision), 1),
    )
    cast = Precision.from_name(precision, torch.device("cpu"))
    dtypes: set[torch.dtype] = set()
    replica.module.into.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    for update in range(10):
        nan_at = (update, 0) if update == 5 else None
        steps = [
            train_updates(one, range(update, update + 1), world=on, precision=cast, nan_at=nan_at)[0][1]
            for one, on in ((replica, world), (plain, 1))
        ]
        assert steps[0] == steps[1], update
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    result, expected = gather_state(replica), gather_state(plain)
    assert max_difference(result.model, expected.model) < 0.02, max_difference(result.model, expected.model)
    assert {tensor.dtype for name, tensor in result.model.items() if name != "calls"} == {torch.float32}
    assert result.facts == expected.facts
    again = make_replica(make_config("sgd", precision, **settings), world)
    load_state(again, result)
    assert_bitwise_equal(result, gather_state(again))


def check_validation(world: int, settings: dict[str, Any]) -> None:
    """`bare` can be called between updates by all ranks, and training continues unaffected."""
    config = make_config("adamw", **settings)
    replica, undisturbed = make_replica(config, world), make_replica(config, world)
    for update in range(3):
        for one in (replica, undisturbed):
            train_updates(one, range(update, update + 1), world=world)
        replica.module.eval()
        with torch.no_grad():
            words, _ = draw_samples(100)
            found = replica.module(words)
        replica.module.train()
        plain = OddSizesModel()
        plain.load_state_dict(dict(gather_state(replica).model))
        torch.testing.assert_close(found, plain.eval()(words))
    assert_bitwise_equal(gather_state(replica), gather_state(undisturbed))


def check_buffers_of_rank_0(world: int, settings: dict[str, Any]) -> None:
    """Running statistics are those of rank 0 when synchronised; padding does not affect them."""
    replica = make_replica(make_config("sgd", **settings), world)
    train_updates(replica, range(2), world=world, even=False)
    own = [part for part in split_micro_batches(world, False, 5, False)[dist.get_rank()] if part != (0, 0)]
    assert int(replica.module.calls) == 2 * len(own)
    replica.broadcast_buffers()
    first = replica.module.mean.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(first, replica.module.mean)


def check_mixed_steps_refused(world: int, settings: dict[str, Any]) -> None:
    """A flat group has one step for all: states that cannot be represented are refused."""
    replica = make_replica(make_config("adamw", **settings), world)
    train_updates(replica, range(2), world=world)
    state = gather_state(replica)
    state.optimizer["out.weight/step"].fill_(7.0)
    with pytest.raises(UsageError, match="keeps one step for a group"):
        load_state(make_replica(make_config("adamw", **settings), world), state)


class CountsInGroup(torch.optim.Optimizer):
    """Keeps its step count in the groups, and the gradients' norm by parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.sub_(mean * (group["lr"] / (1 - 0.9 ** group["count"])))


def check_state_in_groups(world: int, settings: dict[str, Any]) -> None:
    """Restored exactly where the optimizer sees whole parameters; else refused after the first update."""
    own = {"optimizer": {"_target_": "zero_cases.CountsInGroup"}, "recipe": {"trust": ["zero_cases"]}}
    config = replace(make_config("sgd", **settings), **own)
    replica = make_replica(config, world)
    if settings.get("stage"):
        with pytest.raises(UsageError, match="optimizer=CountsInGroup keeps count in its parameter groups"):
            train_updates(replica, range(1), world=world)
        return
    train_updates(replica, range(3), world=world)
    again = make_replica(config, world)
    load_state(again, gather_state(replica))
    for one in (replica, again):
        train_updates(one, range(3, 5), world=world)
    state = gather_state(replica)
    assert state.facts["optimizer"]["entries"] == [{"count": {"value": 5}}]
    assert_bitwise_equal(state, gather_state(again))


def check_timeout(world: int, settings: dict[str, Any]) -> None:
    """DeepSpeed's process group uses our timeout, not torch's half hour."""
    make_replica(replace(make_config("sgd", **settings), launch=LaunchConfig(timeout_s=77.0)), world)
    backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
    assert backend.options._timeout.total_seconds() == 77


Case = tuple[str, Callable[[], None]]


def iter_cases(world: int, folder: Path) -> Iterator[Case]:
    kinds: dict[str, dict[str, Any]] = {f"stage {n}": {"name": "deepspeed", "stage": n} for n in range(4)}
    small = folder / "small.json"
    parts = {"stage3_param_persistence_threshold": 0, "sub_group_size": 100, "reduce_bucket_size": 60}
    small.write_text(json.dumps({"zero_optimization": parts}))
    in_parts = {f"stage {n} in small parts": {**kinds[f"stage {n}"], "config": str(small)} for n in (1, 3)}
    offloaded = {f"stage {n} offloaded": {**kinds[f"stage {n}"], "offload": True} for n in (1, 2, 3)}
    every = {**kinds, **in_parts, **offloaded}
    for name, settings in every.items():
        yield from iter_training_cases(world, name, settings, folder)
    for optimizer in OPTIMIZERS:
        yield f"passed on: {optimizer}", partial(check_state_across_strategies, world, optimizer, every)
    for name, settings in {**kinds, **in_parts}.items():
        yield f"validated: {name}", partial(check_validation, world, settings)
        yield f"fp16: {name}", partial(check_mixed_precision, world, settings, "fp16")
    for name, settings in kinds.items():
        yield f"bf16: {name}", partial(check_mixed_precision, world, settings, "bf16")
        yield f"buffers: {name}", partial(check_buffers_of_rank_0, world, settings)
    yield "mixed steps", partial(check_mixed_steps_refused, world, kinds["stage 2"])
    for name, settings in {**kinds, "fsdp": {"name": "fsdp"}}.items():
        yield f"state in groups: {name}", partial(check_state_in_groups, world, settings)
    yield "timeout", partial(check_timeout, world, kinds["stage 1"])


def iter_training_cases(world: int, name: str, settings: dict[str, Any], folder: Path) -> Iterator[Case]:
    for optimizer in OPTIMIZERS:
        yield f"as ddp: {name}, {optimizer}", partial(check_equal_to_ddp, world, settings, optimizer, True)
        if world > 1:
            yield f"uneven: {name}, {optimizer}", partial(check_equal_to_ddp, world, settings, optimizer, False)
        yield f"goes on: {name}, {optimizer}", partial(check_resume, world, settings, optimizer)
        file = folder / f"{name}-{optimizer}.pt"
        yield (
            f"another world: {name}, {optimizer}",
            partial(check_state_from_other_world_size, world, settings, optimizer, file),
        )
    yield f"not finite: {name}", partial(check_non_finite_update, world, settings, "adamw")
    yield f"first not finite: {name}", partial(check_non_finite_first_update, world, settings, "sgd")
    yield f"rescaled: {name}", partial(check_rescale, world, settings, "sgd")


def main(folder: Path, chosen: str = "") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    outcomes: dict[str, str] = {}
    for name, case in iter_cases(world, folder):
        if chosen not in name:
            continue
        try:
            case()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            if chosen:
                print(dist.get_rank(), outcomes[name], flush=True)
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, outcomes[name])
        outcomes[name] = next((one for one in gathered if one), "")
        gc.freeze()  # each stage 3 engine collects garbage, and would scan all live objects
    if dist.get_rank() == 0:
        (folder / f"outcomes-{world}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
