"""What test_deepspeed.py runs in every rank of one process group: each case a function, its outcome a line of JSON.

`python -m torch.distributed.run … zero_cases.py FOLDER`: outcomes go to FOLDER/outcomes-<world>.json, and the state
that is passed from world size to world size lies in FOLDER too.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from launcher.optim import Precision
from launcher.settings import LrSettings, Run, StrategySettings, TrainSettings
from launcher.strategies import Replica, prepare
from launcher.telemetry import HostTimer, StageClock

BATCH = 12
OPTIMIZERS = {
    "sgd": {"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"_target_": "torch.optim.AdamW", "weight_decay": 0.1},
}
State = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]


class Odd(nn.Module):
    """Sizes that no world size divides, a tied and a frozen parameter, buffers that training changes."""

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


def run_of(optimizer: str, precision: str = "fp32", **strategy: Any) -> Run:
    return Run(
        optimizer=OPTIMIZERS[optimizer],
        lr=LrSettings(base=0.1),
        train=TrainSettings(precision=precision),
        strategy=StrategySettings(**strategy),
    )


def made(run: Run, world: int) -> Replica:
    torch.manual_seed(1)
    precision = Precision.of(run.train.precision, torch.device("cpu"))
    return prepare(Odd().train(), run, world, precision, StageClock(HostTimer()))


def samples(update: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(update)
    words = torch.randint(0, 11, (2, BATCH), generator=generator)
    return words[0], words[1]


def shares(world: int, even: bool) -> list[int]:
    """Even, or one micro-batch more in the first and nothing at all for the last rank."""
    if even or world == 1:
        return [BATCH // world] * world
    return [BATCH] + [0] * (world - 1) if world == 2 else [BATCH - 2, 2, 0]


def micro_batches(world: int, even: bool, per_device: int, padded: bool) -> list[list[tuple[int, int]]]:
    """(start, stop) of each rank's micro-batches; an empty one is a pad."""
    parts, start = [], 0
    for share in shares(world, even):
        stop = start + share
        parts.append([(at, min(at + per_device, stop)) for at in range(start, stop, per_device)])
        start = stop
    longest = max(len(part) for part in parts) if padded else 1
    return [part + [(0, 0)] * (longest - len(part)) for part in parts]


def trained(
    replica: Replica,
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
    """Update after update on this rank's share, as the loop does it; the norms, and whether each was applied.

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
            with replica.micro(last=index == len(parts) - 1, pad=pad, place=rank):
                with precision.autocast() if precision else torch.autocast("cpu", enabled=False):
                    total = cross_entropy(replica.model(words[chosen]).float(), next_words[chosen], reduction="sum")
                if pad or poison == (update, rank):
                    total = total * math.nan
                replica.backward(total, BATCH)
        step = replica.step(0.02, None, rescale, clip_norm)
        steps.append((float(step.norm), bool(step.finite)))
    return steps


def state_of(replica: Replica) -> State:
    """Rank 0's, on every rank."""
    model, optimizer, facts = replica.tensors()
    held = [
        (
            {name: tensor.clone() for name, tensor in model.items()},
            {name: tensor.clone() for name, tensor in optimizer.items()},
            facts,
        )
    ]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


def furthest(one: State, other: State) -> float:
    assert one[0].keys() == other[0].keys()
    return max(float((one[0][name].double() - other[0][name].double()).abs().max()) for name in one[0])


def same_bits(one: State, other: State) -> None:
    for here, there in zip(one[:2], other[:2], strict=True):
        assert here.keys() == there.keys(), here.keys() ^ there.keys()
        for name, tensor in here.items():
            twin = there[name]
            assert (tensor.shape, tensor.dtype) == (twin.shape, twin.dtype), name
            assert tensor.numpy().tobytes() == twin.numpy().tobytes(), name
    assert one[2] == other[2]


# The cases


def as_ddp_on_one_worker(world: int, settings: dict[str, Any], optimizer: str, even: bool) -> None:
    run = run_of(optimizer, **settings)
    padded = run.strategy.stage >= 2
    replica, plain = made(run, world), made(run_of(optimizer), 1)
    for span, clip_norm in ((range(10), None), (range(10, 20), 0.4)):
        steps = trained(replica, span, world=world, even=even, padded=padded, clip_norm=clip_norm)
        wanted = trained(plain, span, world=1, clip_norm=clip_norm)
        for (norm, applied), (right, _) in zip(steps, wanted, strict=True):
            assert applied
            assert abs(norm - right) < 1e-4 * right, (norm, right)
    here, there = state_of(replica), state_of(plain)
    for name in ("mean", "calls"):
        here[0].pop(name), there[0].pop(name)  # what a rank saw of the batch
    far = furthest(here, there)
    assert far <= 1e-5, far
    slots = max(float((here[1][name] - there[1][name]).abs().max()) for name in there[1])
    assert slots <= 1e-4, slots
    assert here[1].keys() == there[1].keys()
    assert here[2] == there[2]


def not_finite(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """A NaN in one rank's loss: nothing changes on any rank, and the next update is as if it had never been."""
    run = run_of(optimizer, **settings)
    replica, untroubled = made(run, world), made(run, world)
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
    run = run_of(optimizer, **settings)
    replica = made(run, world)
    before = state_of(replica)
    assert not trained(replica, range(1), world=world, poison=(0, 0))[0][1]
    same_bits(before, state_of(replica))


def rescaled(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """As plain torch's gradients times 1.7, in the norm and under clipping too; NaN (nothing to count) skips."""
    run = run_of(optimizer, **settings)
    replica, plain = made(run, world), made(run_of(optimizer), 1)
    steps = trained(replica, range(6), world=world, rescale=1.7, clip_norm=1.0)
    wanted = trained(plain, range(6), world=1, rescale=1.7, clip_norm=1.0)
    for (norm, _), (right, _) in zip(steps, wanted, strict=True):
        assert abs(norm - right) < 1e-4 * right, (norm, right)
    before = state_of(replica)
    assert not trained(replica, range(6, 7), world=world, rescale=math.nan)[0][1]
    same_bits(before, state_of(replica))
    there = state_of(plain)
    for name in ("mean", "calls"):
        before[0].pop(name), there[0].pop(name)
    assert furthest(before, there) <= 1e-5


def goes_on(world: int, settings: dict[str, Any], optimizer: str) -> None:
    """Saved, taken over by a new replica of the same kind, and gone on with: bit for bit as without."""
    run = run_of(optimizer, **settings)
    straight, first, second = made(run, world), made(run, world), made(run, world)
    trained(straight, range(8), world=world)
    trained(first, range(4), world=world)
    second.restore(*state_of(first))
    same_bits(state_of(first), state_of(second))
    trained(second, range(4, 8), world=world)
    same_bits(state_of(straight), state_of(second))


def passed_on(world: int, optimizer: str, kinds: dict[str, dict[str, Any]]) -> None:
    """A state goes through every strategy and stage, one after the other, and comes out with the same bits."""
    first = made(run_of(optimizer), 1)
    trained(first, range(5), world=1)
    state = state_of(first)
    for name, settings in kinds.items():
        replica = made(run_of(optimizer, **settings), world)
        trained(replica, range(2), world=world)  # what it had before does not shine through
        fresh = made(run_of(optimizer, **settings), world)
        for taker in (fresh, replica):
            taker.restore(*state)
            try:
                same_bits(state, state_of(taker))
            except AssertionError as problem:
                raise AssertionError(f"{name}: {problem}") from problem
    back = made(run_of(optimizer), 1)
    back.restore(*state)
    same_bits(state, state_of(back))
    assert trained(back, range(5, 7), world=1) == trained(first, range(5, 7), world=1)


def from_another_world(world: int, settings: dict[str, Any], optimizer: str, file: Path) -> None:
    """What another world size left: taken over bit for bit, trained on, and left for the next."""
    replica = made(run_of(optimizer, **settings), world)
    if file.exists():
        state = torch.load(file, weights_only=True)
        replica.restore(*state)
        same_bits(state, state_of(replica))
    trained(replica, range(3), world=world)
    left = state_of(replica)
    if dist.get_rank() == 0:
        torch.save(left, file)
    dist.barrier()


def mixed_precision(world: int, settings: dict[str, Any], precision: str) -> None:
    """As under DDP in the same precision: what a loss is autocast to, and how fp16's scale shrinks and is kept."""
    run, plain_run = run_of("adamw", precision, **settings), run_of("adamw", precision)
    replica, plain = made(run, world), made(plain_run, 1)
    cast = Precision.of(precision, torch.device("cpu"))
    seen: list[torch.dtype] = []
    replica.bare.into.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    trained(replica, range(10), world=world, precision=cast)
    trained(plain, range(10), world=1, precision=cast)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    here, there = state_of(replica), state_of(plain)
    for name in ("mean", "calls"):
        here[0].pop(name), there[0].pop(name)
    assert furthest(here, there) <= 0.05, furthest(here, there)  # AdamW turns the noise of 8 bits into whole steps
    assert {tensor.dtype for name, tensor in here[0].items()} == {torch.float32}
    trained(replica, range(10, 11), world=world, precision=cast, poison=(10, 0))
    trained(plain, range(10, 11), world=1, precision=cast, poison=(10, 0))
    assert state_of(replica)[2]["scaler"] == state_of(plain)[2]["scaler"]


def validated(world: int, settings: dict[str, Any]) -> None:
    """`bare` can be called between updates, by all ranks alike, and training goes on as if it had not been."""
    run = run_of("adamw", **settings)
    replica, undisturbed = made(run, world), made(run, world)
    for update in range(3):
        for one in (replica, undisturbed):
            trained(one, range(update, update + 1), world=world)
        replica.bare.eval()
        with torch.no_grad():
            words, _ = samples(100)
            found = replica.bare(words)
        replica.bare.train()
        plain = Odd()
        plain.load_state_dict(state_of(replica)[0])
        torch.testing.assert_close(found, plain.eval()(words))
    same_bits(state_of(replica), state_of(undisturbed))


def buffers_of_rank_0(world: int, settings: dict[str, Any]) -> None:
    replica = made(run_of("sgd", **settings), world)
    trained(replica, range(2), world=world)
    replica.settle_buffers()
    held = [replica.bare.mean.clone()] * 1
    dist.broadcast(held[0], src=0)
    assert torch.equal(held[0], replica.bare.mean)
    assert int(replica.bare.calls) == 2 * len([part for part in micro_batches(world, True, 5, True)[dist.get_rank()]])


def mixed_steps(world: int, settings: dict[str, Any]) -> None:
    from launcher.errors import RequestError

    replica = made(run_of("adamw", **settings), world)
    trained(replica, range(2), world=world)
    model, optimizer, facts = state_of(replica)
    optimizer["out.weight/step"] = torch.tensor(7.0)
    try:
        made(run_of("adamw", **settings), world).restore(model, optimizer, facts)
    except RequestError as problem:
        assert "keeps one step for a group" in str(problem)
    else:
        raise AssertionError("taken over")


def cases(world: int, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    def zero(name: str, **options: Any) -> dict[str, Any]:
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": options}))
        return {"name": "deepspeed", "config": str(file)}

    cut = zero("cut", stage3_param_persistence_threshold=0, sub_group_size=100, reduce_bucket_size=60)
    turns = zero("turns", round_robin_gradients=True, overlap_comm=False)
    kinds: dict[str, dict[str, Any]] = {f"stage {n}": {"name": "deepspeed", "stage": n} for n in range(4)}
    kinds["stage 1 in small buckets"] = {**cut, "stage": 1}
    kinds["stage 2 in turns"] = {**turns, "stage": 2}
    kinds["stage 3 in small parts"] = {**cut, "stage": 3}
    offloaded = {f"stage {n} offloaded": {"name": "deepspeed", "stage": n, "offload": True} for n in (1, 2, 3)}
    for optimizer in OPTIMIZERS:
        for name, settings in {**kinds, **offloaded}.items():
            for even in (True, False) if world > 1 else (True,):
                label = f"as ddp: {name}, {optimizer}, {'even' if even else 'uneven'}"
                yield label, lambda s=settings, o=optimizer, e=even: as_ddp_on_one_worker(world, s, o, e)
            yield f"not finite: {name}, {optimizer}", lambda s=settings, o=optimizer: not_finite(world, s, o)
            yield f"first not finite: {name}, {optimizer}", lambda s=settings, o=optimizer: not_finite_at_first(world, s, o)
            yield f"rescaled: {name}, {optimizer}", lambda s=settings, o=optimizer: rescaled(world, s, o)
            yield f"goes on: {name}, {optimizer}", lambda s=settings, o=optimizer: goes_on(world, s, o)
            file = folder / f"{name}-{optimizer}.pt"
            yield (
                f"another world: {name}, {optimizer}",
                lambda s=settings, o=optimizer, f=file: from_another_world(world, s, o, f),
            )
        yield f"passed on: {optimizer}", lambda o=optimizer: passed_on(world, o, {**kinds, **offloaded})
    for name, settings in kinds.items():
        yield f"validated: {name}", lambda s=settings: validated(world, s)
        yield f"buffers: {name}", lambda s=settings: buffers_of_rank_0(world, s)
        for precision in ("bf16", "fp16"):
            yield f"{precision}: {name}", lambda s=settings, p=precision: mixed_precision(world, s, p)
    yield "mixed steps", lambda: mixed_steps(world, kinds["stage 2"])


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
    if dist.get_rank() == 0:
        (folder / f"outcomes-{world}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
