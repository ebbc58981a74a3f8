"""The table of per-rank statistics in DDP's buckets; test_missing_gradients has several ranks and all strategies."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launcher.config.schema import RunConfig, StrategyConfig
from launcher.errors import TrainingFailed
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.normalizer import multiply_gradients, split_normalizer
from launcher.strategies.precision import Precision
from launcher.strategies.stats_exchange import StatsInBucket
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.telemetry.stats_fields import NUM_STATS

CPU = torch.device("cpu")
RUN = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD", "momentum": 0.9})


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_replica(world: int = 2, precision: str = "fp32", *, find_unused: bool = False) -> DdpReplica:
    """With `world` 2, DDP and its hooks work as with two ranks, though the process group has one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    config = replace(RUN, strategy=StrategyConfig(find_unused_parameters=find_unused))
    return DdpReplica(ReplicaArgs(model, config, world, Precision.from_name(precision, CPU), StageClock(HostTimer())))


def run_backward(
    replica: DdpReplica, row: list[float], count: float = 4, *, last: bool = True, is_padding: bool = False
) -> None:
    """One micro-batch, measured for the noise scale."""
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    with replica.micro_batch(last=last, is_padding=is_padding, shard=0):
        loss = replica.compute_loss(lambda model, x: Loss(model(x).square().sum(), count), batch)
        if last:
            replica.send_stats(row)
        replica.backward(loss.total, 4, count)


def make_row() -> list[float]:
    return [0.1 + 1e9 / 3 * field for field in range(NUM_STATS)]


def get_rows(table: torch.Tensor) -> list[list[float]]:
    """Each rank's numbers, of which each is the sum of its words."""
    return [[sum(words) for words in zip(*rank, strict=True)] for rank in table.tolist()]


def test_statistics_are_no_part_of_the_model_or_its_gradient() -> None:
    replica, row = make_replica(), make_row()
    run_backward(replica, row, last=False)
    run_backward(replica, row)
    own, other = get_rows(replica.receive_stats())
    assert own == pytest.approx(row, rel=1e-13, abs=0)
    assert not any(other), "there is no second rank"
    assert set(replica.module.state_dict()) == set(replica.full_state().model)
    assert not any("stats" in name for name in replica.full_state().model)
    assert sum(len(group["params"]) for group in replica.optimizer.param_groups) == 4
    alone = make_replica(world=1)
    run_backward(alone, row, last=False)
    run_backward(alone, row)
    assert float(replica.step(0.1, None, 1.0, None).norm) == float(alone.step(0.1, None, 1.0, None).norm)


@pytest.mark.parametrize("find_unused", [False, True])
def test_statistics_are_no_part_of_the_norm_for_the_noise_scale(find_unused: bool) -> None:
    """The norm is that of the bucket in which they travel."""
    rows = (make_row(), [0.0] * NUM_STATS)
    steps = []
    for row in rows:
        replica = make_replica(find_unused=find_unused)
        run_backward(replica, row)
        assert get_rows(replica.receive_stats())[0] == pytest.approx(row, rel=1e-13, abs=0)
        steps.append(replica.step(0.1, None, 1.0, None))
    assert steps[0].groups == 1
    assert float(steps[0].group_sq_norm_sum) == float(steps[1].group_sq_norm_sum) > 0


@pytest.mark.parametrize("find_unused", [False, True])
def test_padding_sends_statistics_and_zeros_as_gradients(find_unused: bool) -> None:
    replica, row = make_replica(find_unused=find_unused), make_row()
    for _ in range(2):
        run_backward(replica, row, is_padding=True)
        assert get_rows(replica.receive_stats())[0] == pytest.approx(row, rel=1e-13, abs=0)
        gradients = [p.grad for p in replica.module.parameters() if p.grad is not None]
        assert not any(map(torch.count_nonzero, gradients))
        replica.discard_update()


def test_statistics_exchanged_outside_of_a_backward_pass_have_the_same_bits() -> None:
    """Else a run that continues from a checkpoint would differ in the last bits from one that did not stop."""
    replica, row = make_replica(), [number / 3 for number in make_row()]
    run_backward(replica, row)
    travelled = get_rows(replica.receive_stats())[0]
    assert travelled != row, "two float32 words hold fewer digits than a float64"
    assert get_rows(replica.exchange_stats(row))[0] == travelled


@pytest.mark.parametrize("is_tensor", [False, True], ids=["numbers", "tensor, as on a GPU"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -0.0, 1e-30])
def test_numbers_that_float32_does_not_hold_do_not_become_others(value: float, is_tensor: bool) -> None:
    row = [value] * NUM_STATS
    stats = StatsInBucket(0, 1, CPU, torch.float32)
    found = float(stats.round(torch.tensor(row, dtype=torch.float64) if is_tensor else row)[0])
    expected = math.copysign(math.inf, value) if abs(value) > 1e38 else value
    assert math.isnan(found) if math.isnan(value) else found == pytest.approx(expected)


@pytest.mark.parametrize("world", [1, 2])
def test_total_in_float16_has_a_finite_gradient_under_the_first_loss_scale(world: int) -> None:
    """The loss scale, 65,536, is more than float16 holds."""
    replica = make_replica(world, "fp16")
    batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        loss = replica.compute_loss(lambda model, x: Loss(model(x).square().sum().half(), 4), batch)
        replica.send_stats(make_row())
        replica.backward(loss.total, 4)
    replica.receive_stats()
    assert bool(replica.step(0.1, None, 1.0, None).finite)


def test_replica_of_one_worker_is_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        replica = make_replica(world=1)
        run_backward(replica, make_row())
        freed = weakref.ref(replica)
        del replica
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_normalizer_on_the_device_is_that_of_the_host(precision: str) -> None:
    """It scales the same gradients; where it is infinite, nothing counted, and nothing is stepped."""
    on_host, on_device = make_replica(precision=precision), make_replica(precision=precision)
    for replica, normalizer in ((on_host, 0.5), (on_device, torch.tensor(0.5, dtype=torch.float64))):
        run_backward(replica, make_row())
        replica.receive_stats()
        replica.step(0.1, None, normalizer, 1.0)
    state = on_host.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in on_device.module.state_dict().items())
    run_backward(on_device, make_row(), count=0)
    on_device.receive_stats()
    step = on_device.step(0.1, None, torch.tensor(math.inf, dtype=torch.float64), 1.0)
    assert (bool(step.finite), math.isnan(float(step.norm))) == (True, True)
    after = on_device.module.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in ("1.weight", "1.bias"))
    assert not torch.equal(after["0.running_mean"], state["0.running_mean"]), "buffers keep what forward made of them"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_update_without_any_gradient_is_discarded_or_refused(precision: str) -> None:
    replica = make_replica(world=1, precision=precision)
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        loss = replica.compute_loss(lambda model, x: Loss(torch.zeros(()), 0), None)
        replica.send_stats(make_row())
        replica.backward(loss.total, 4)
    replica.receive_stats()
    step = replica.step(0.1, None, torch.tensor(math.inf, dtype=torch.float64), None)
    assert bool(step.finite)
    with pytest.raises(TrainingFailed, match="the loss depends on no trained parameter"):
        replica.step(0.1, None, 1.0, None)


def test_normalizer_on_the_device_is_not_read() -> None:
    """A meta tensor has no value: reading it raises, as it would make the host wait for a GPU."""
    factor, counted = split_normalizer(torch.zeros((), dtype=torch.float64, device="meta"))
    assert counted is not None
    multiply_gradients([torch.zeros(3, device="meta")], factor)
