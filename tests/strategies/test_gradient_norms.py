"""Gradient statistics of a replica: the sums that the noise scale needs, compared with autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.config.schema import ElasticConfig, RunConfig, StrategyConfig
from launcher.distributed.rank_stats import GatheredStats, RankStats
from launcher.goodput.noise_scale import NoiseScale, estimate_variance_and_square
from launcher.plan.batch import BatchPlan
from launcher.plan.timeline import Update
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.exact import ExactReplica
from launcher.strategies.fsdp import FsdpReplica
from launcher.strategies.gradient_norms import compute_norms
from launcher.strategies.interface import Replica, ReplicaArgs, StepResult
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.telemetry.update_scalars import UpdateScalars
from launcher.train.state import NoiseObservation

CPU = torch.device("cpu")
RUN = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD"})
SAMPLES = 12


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """A process group of one rank: DDP's hooks run as with many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with a tied weight, whose gradient has two contributions."""
    torch.manual_seed(0)
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, 5, dtype=dtype), torch.randn(SAMPLES, 1, dtype=dtype)


def total(net: nn.Module, part: slice, dtype: torch.dtype = torch.float64) -> Tensor:
    inputs, targets = data(dtype)
    return (net(inputs[part]) - targets[part]).square().sum()


def compute_total(replica: Replica, part: slice, dtype: torch.dtype = torch.float64) -> Tensor:
    """The total as a recipe's loss gives it to the replica."""
    loss = replica.compute_loss(lambda net, samples: Loss(total(net, samples, dtype), 1), part)
    return cast(Tensor, loss.total)


def square_norm(parts: Sequence[slice], counts: float) -> float:
    """|g|² of the mean over `counts` of these samples' losses."""
    net = model()
    loss = torch.stack([total(net, part) for part in parts]).sum() / counts
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    return float(sum(gradient.square().sum() for gradient in gradients))


def slice_samples(sizes: Sequence[int]) -> list[slice]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def run_update(
    replica: Replica,
    sizes: Sequence[int],
    *,
    samples: int = SAMPLES,
    shards: Sequence[int] | None = None,
    tokens: float = 1.0,
    clip_norm: float | None = None,
    dtype: torch.dtype = torch.float64,
    measured: bool = True,
) -> StepResult:
    """Run one update with these micro-batch sizes, as the loop does; a loss counts `tokens` per sample."""
    for index, part in enumerate(slice_samples(sizes)):
        shard = shards[index] if shards else 0
        with replica.micro_batch(last=index == len(sizes) - 1, is_padding=False, shard=shard):
            replica.backward(compute_total(replica, part, dtype), samples, tokens * sizes[index] * measured)
    return replica.step(0.01, None, 1 / tokens, clip_norm)


def ddp(world: int = 1, precision: str = "fp64", **keys: Any) -> DdpReplica:
    made = Precision.from_name(precision, CPU)
    return DdpReplica(ReplicaArgs(model(made.dtype), replace(RUN, **keys), world, made, StageClock(HostTimer())))


def exact() -> ExactReplica:
    config = replace(RUN, elastic=ElasticConfig(exact=True, shards=4))
    return ExactReplica(ReplicaArgs(model(), config, 1, Precision.from_name("fp64", CPU), StageClock(HostTimer())))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 4, 3), (7, 5), (1,) * 12])
def test_single_worker_groups_are_micro_batches(sizes: Sequence[int]) -> None:
    step = run_update(ddp(), sizes)
    by_hand = sum(size * square_norm([part], size) for size, part in zip(sizes, slice_samples(sizes), strict=True))
    assert step.groups == len(sizes)
    assert float(step.group_sq_norm_sum) * SAMPLES**2 == pytest.approx(by_hand, rel=1e-12)
    assert float(step.norm) ** 2 == pytest.approx(square_norm([slice(0, SAMPLES)], SAMPLES), rel=1e-12)


def test_single_micro_batch_gives_no_group() -> None:
    assert run_update(ddp(), [SAMPLES]).groups == 0


def test_groups_reset_every_update() -> None:
    replica = ddp()
    assert [run_update(replica, sizes).groups for sizes in ((6, 6), (12,), (4, 4, 4))] == [2, 0, 3]


def test_rank_contributes_its_local_gradient_norm() -> None:
    """This rank has 7 of 12 samples in two micro-batches; a group of one receives no other gradients."""
    step = run_update(ddp(world=2), [4, 3], samples=SAMPLES)
    assert step.groups == 1
    assert float(step.group_sq_norm_sum) * SAMPLES**2 == pytest.approx(7 * square_norm([slice(0, 7)], 7), rel=1e-12)


def test_rank_without_samples_gives_no_group() -> None:
    replica = ddp(world=2)
    with replica.micro_batch(last=True, is_padding=True, shard=0):
        replica.backward(compute_total(replica, slice(0, 1)) * torch.nan, SAMPLES, 1.0)
    step = replica.step(0.01, None, 1.0, None)
    assert (step.groups, float(step.group_sq_norm_sum)) == (0, 0.0)


@pytest.mark.parametrize("shards", [(0, 1, 2), (0, 0, 1)])
def test_exact_mode_groups_are_shards(shards: Sequence[int]) -> None:
    sizes = (5, 4, 3)
    step = run_update(exact(), sizes, shards=shards)
    by_hand = 0.0
    for shard in set(shards):
        parts = [part for part, where in zip(slice_samples(sizes), shards, strict=True) if where == shard]
        count = sum(part.stop - part.start for part in parts)
        by_hand += count * square_norm(parts, count)
    assert step.groups == len(set(shards))
    assert float(step.group_sq_norm_sum) * SAMPLES**2 == pytest.approx(by_hand, rel=1e-12)


def test_clipping_does_not_affect_norms() -> None:
    free, clipped = (run_update(ddp(), [6, 6], clip_norm=clip) for clip in (None, 1e-3))
    assert (clipped.group_sq_norm_sum, clipped.norm) == (free.group_sq_norm_sum, free.norm)


def test_loss_scale_is_divided_out() -> None:
    """fp16 scales its losses by 65536."""
    plain, scaled = (run_update(ddp(precision=name), [7, 5], dtype=torch.float32) for name in ("fp32", "fp16"))
    assert float(scaled.group_sq_norm_sum) == pytest.approx(float(plain.group_sq_norm_sum), rel=1e-5)
    assert float(scaled.norm) == pytest.approx(float(plain.norm), rel=1e-5)


def test_chunking_does_not_affect_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_update(ddp(), [6, 6]).group_sq_norm_sum
    monkeypatch.setattr("launcher.strategies.gradient_norms.CHUNK_NUMEL", 10)
    assert float(run_update(ddp(), [6, 6]).group_sq_norm_sum) == pytest.approx(float(whole), rel=1e-12)
    monkeypatch.setattr("launcher.strategies.gradient_norms.PIECE_NUMEL", 10)
    assert float(run_update(ddp(), [6, 6]).group_sq_norm_sum) == pytest.approx(float(whole), rel=1e-12)


def test_forward_pass_before_training_does_not_affect_fsdp_norms() -> None:
    """Without resharding, it leaves the blocks gathered when the whole model is called in training."""
    plain = run_update(ddp(), [7, 5])
    strategy = StrategyConfig(name="fsdp", reshard_after_forward=False)
    made = Precision.from_name("fp64", CPU)
    net = cast(nn.Sequential, model())
    config = replace(RUN, strategy=strategy)
    replica = FsdpReplica(ReplicaArgs(net, config, 1, made, StageClock(HostTimer()), blocks=[net[-1]]))
    with torch.no_grad():
        compute_total(replica, slice(0, 1))
    sharded = run_update(replica, [7, 5])
    assert float(sharded.group_sq_norm_sum) == pytest.approx(float(plain.group_sq_norm_sum), rel=1e-12)


class CountedWalks(nn.Linear):
    walks = 0

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        self.walks += 1
        return super().named_parameters(*args, **kwargs)


def test_frozen_block_is_searched_for_trained_parameters_once() -> None:
    frozen = CountedWalks(5, 5, dtype=torch.float64).requires_grad_(False)
    net = nn.Sequential(frozen, model())
    config = replace(RUN, strategy=StrategyConfig(name="fsdp"))
    made = Precision.from_name("fp64", CPU)
    replica = FsdpReplica(ReplicaArgs(net, config, 1, made, StageClock(HostTimer()), blocks=[frozen]))
    run_update(replica, [7, 5])
    before = frozen.walks
    run_update(replica, [4, 4, 4])
    assert before > 0
    assert frozen.walks == before


@pytest.mark.parametrize(("world", "first"), [(1, 40), (2, 200)])
def test_later_updates_are_measured_every_fourth(world: int, first: int) -> None:
    """One worker needs statistics of each micro-batch, and gathers every update for a shorter time."""
    replica = ddp(world=world)
    skipped = [update for update in range(first + 10) if not replica.measures_noise_at(update)]
    assert skipped == [first + later for later in (1, 2, 3, 5, 6, 7, 9)]


def test_unmeasured_update_has_no_groups() -> None:
    """A single worker, several ranks (of two, this is one), and exact mode."""
    for replica, groups in ((ddp(), 2), (ddp(world=2), 1), (exact(), 2)):
        assert run_update(replica, [6, 6], shards=[0, 1]).groups == groups
        assert run_update(replica, [6, 6], shards=[0, 1], measured=False).groups == 0
        assert run_update(replica, [6, 6], shards=[0, 1]).groups == groups


def test_norm_of_long_gradient_is_precise() -> None:
    """A single fp32 sum would be 1e-4 too small: enough to hide the noise of a batch far above its scale."""
    torch.manual_seed(0)
    long = torch.randn(1_000, 3_000)
    found = torch.stack(compute_norms([long, long.t(), long.flatten()])).double().square().sum()
    assert float(found) == pytest.approx(3 * float(long.double().square().sum()), rel=1e-6)


# --- from the gathered statistics to the estimate -------------------------------------------------------------------


def gather(steps: Sequence[StepResult], counts: Sequence[float], finite: float = 1.0) -> GatheredStats:
    norm = float(steps[0].norm)
    rank_stats = [
        RankStats(
            previous=UpdateScalars(
                loss_count=count,
                finite=finite,
                grad_norm=norm,
                group_sq_norm_sum=float(step.group_sq_norm_sum),
                groups=step.groups,
            )
        )
        for step, count in zip(steps, counts, strict=True)
    ]
    return GatheredStats.from_ranks(rank_stats)


def update_noise_scale(noise: NoiseScale, gathered: GatheredStats, update: Update) -> NoiseScale:
    observation = NoiseObservation.from_stats(gathered, update)
    return noise if observation is None else observation.apply(noise)


def make_update(samples: int = SAMPLES, nominal: int = SAMPLES) -> Update:
    plan = BatchPlan(world=1, shares=(nominal,), per_device=nominal, accumulation=1)
    return Update(0, 0, plan, plan.truncated(samples), size=1000)


def estimate_by_hand(sizes: Sequence[int]) -> tuple[float, float]:
    squares = [square_norm([part], size) for size, part in zip(sizes, slice_samples(sizes), strict=True)]
    return estimate_variance_and_square(sizes, squares, square_norm([slice(0, SAMPLES)], SAMPLES))


@pytest.mark.parametrize("tokens", [1.0, 50.0])
def test_estimate_matches_formula(tokens: float) -> None:
    """Return S and |G|² of one update, in samples, whatever the losses count."""
    sizes = (5, 4, 3)
    step = run_update(ddp(), sizes, tokens=tokens)
    noise = update_noise_scale(NoiseScale(), gather([step], [tokens * SAMPLES]), make_update())
    variance, square = estimate_by_hand(sizes)
    assert noise.block == (pytest.approx((variance / tokens**2, square / tokens**2), rel=1e-9),)


def test_ranks_and_micro_batches_give_same_estimate() -> None:
    """Two ranks with 7 and 5 samples, or one worker with micro-batches of 7 and 5."""
    step = run_update(ddp(), [7, 5])
    mine, other = ([run_update(ddp(world=2), sizes)] for sizes in ([7], [5]))
    theirs = replace_spread(other[0], 5 * square_norm([slice(7, 12)], 5) / SAMPLES**2)
    ranks = gather([replace_norm(mine[0], step), theirs], [7, 5])
    assert update_noise_scale(NoiseScale(), ranks, make_update()).block == (
        pytest.approx(update_noise_scale(NoiseScale(), gather([step], [12]), make_update()).block[0], rel=1e-12),
    )


def replace_spread(step: StepResult, spread: float) -> StepResult:
    return replace(step, group_sq_norm_sum=torch.tensor(spread, dtype=torch.float64))


def replace_norm(step: StepResult, other: StepResult) -> StepResult:
    """A group of one receives no other gradients."""
    return replace(step, norm=other.norm)


def uninformative_updates() -> Mapping[str, partial[NoiseScale]]:
    step = StepResult(torch.tensor(1.0), torch.tensor(True), torch.tensor(0.5), 2)
    return {
        "a tail": partial(update_noise_scale, gathered=gather([step], [5]), update=make_update(samples=5)),
        "one group": partial(
            update_noise_scale, gathered=gather([replace(step, groups=1)], [12]), update=make_update()
        ),
        "an update that was skipped": partial(
            update_noise_scale, gathered=gather([step], [12], finite=0.0), update=make_update()
        ),
        "an update that counted nothing": partial(
            update_noise_scale, gathered=gather([step], [0]), update=make_update()
        ),
    }


@pytest.mark.parametrize("case", uninformative_updates())
def test_uninformative_updates_change_nothing(case: str) -> None:
    noise = NoiseScale()
    assert uninformative_updates()[case](noise) is noise
