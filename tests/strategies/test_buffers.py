"""Buffers that a forward pass assigns anew: skipped updates, padding, recomputation, other ranks, and checkpoints."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.manifest import open_checkpoint
from launcher.checkpoint.model_layout import check_tensor_names
from launcher.checkpoint.tensor_io import CheckpointState, SaveOptions, load_checkpoint, save_checkpoint
from launcher.config.schema import ElasticConfig, RunConfig
from launcher.errors import UsageError
from launcher.recipe import Loss
from launcher.strategies import buffers
from launcher.strategies.activation_checkpointing import apply_activation_checkpointing
from launcher.strategies.buffer_layout import synchronize_buffers
from launcher.strategies.buffers import BufferSnapshot
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.exact import ExactReplica
from launcher.strategies.fsdp import FsdpReplica
from launcher.strategies.interface import Replica, ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock

CPU = torch.device("cpu")
RUN = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD"})


class Assigning(nn.Module):
    """Has a buffer of every kind that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 1)
        self.register_buffer("centre", torch.zeros(3))  # assigned
        self.register_buffer("total", torch.zeros(3))  # changed in place
        self.register_buffer("hidden", torch.zeros(3), persistent=False)  # assigned, not saved
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # a counter that is assigned
        self.register_buffer("history", torch.zeros(0, 3))  # grows
        self.register_buffer("first", None)  # set later
        self.register_buffer("unset", torch.ones(2))  # ceases to be set
        self.register_buffer("precise", torch.zeros(3))  # gets another dtype
        self.register_buffer("flat", torch.zeros(1).expand(3))  # elements that share memory

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            mean = x.detach().mean(0)
            self.centre = 0.5 * self.centre + mean
            self.total += mean
            self.hidden = self.hidden + mean
            self.seen = self.seen + len(x)
            self.history = torch.cat([self.history, mean[None]])
            self.first = mean
            self.unset = None
            self.precise = self.precise.double() + mean
            self.flat = self.flat + 1
            self.register_buffer("later", mean.clone())
        return self.out(x - self.centre - self.total)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch.use_deterministic_algorithms(False)


def make_replica(model: nn.Module, kind: type = DdpReplica, config: RunConfig = RUN) -> Replica:
    precision = Precision.from_name("fp32", CPU)
    replica: Replica = kind(ReplicaArgs(model, config, 1, precision, StageClock(HostTimer())))
    return replica


def update(replica: Replica, x: torch.Tensor, *, is_padding: bool = False, shard: int = 0, last: bool = True) -> None:
    with replica.micro_batch(last=last, is_padding=is_padding, shard=shard):
        loss = replica.compute_loss(lambda model, batch: Loss(model(batch).square().sum(), len(batch)), x)
        replica.backward(loss.total, len(x))


def copy_buffers(model: nn.Module) -> dict[str, Any]:
    """Every buffer by name, None where it is not set; with its dtype, since values may be equal without."""
    return {
        f"{path}.{name}": None if tensor is None else (str(tensor.dtype), tensor.tolist())
        for path, module in model.named_modules()
        for name, tensor in module._buffers.items()
    }


def draw(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))


# Updates that are skipped
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [DdpReplica, FsdpReplica])
def test_skipped_update_changes_no_buffer(kind: type) -> None:
    replica = make_replica(Assigning(), kind)
    for _ in range(2):
        before = copy_buffers(replica.module)
        update(replica, draw() * float("nan"))
        assert not bool(replica.step(0.1, None, 1.0, None).finite)
        assert copy_buffers(replica.module) == before
        update(replica, draw())
        assert bool(replica.step(0.1, None, 1.0, None).finite)
        assert copy_buffers(replica.module) != before
    assert replica.module.get_buffer("history").shape == (2, 3)
    assert int(replica.module.get_buffer("seen")) == 8


class Registers(nn.Module):
    """Registers a buffer in its first forward pass, and remembers that in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.is_ready = nn.Linear(3, 1), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_ready:
            self.register_buffer("table", torch.arange(3.0), persistent=False)
            self.is_ready = True
        return self.out(x + self.table)


def test_buffer_registered_in_skipped_update_stays_if_finite() -> None:
    replica = make_replica(Registers())
    update(replica, draw() * float("nan"))
    replica.step(0.1, None, 1.0, None)
    update(replica, draw())
    assert bool(replica.step(0.1, None, 1.0, None).finite)


@pytest.mark.parametrize("condition", [True, False])
def test_buffers_chosen_on_the_device_are_those_chosen_on_the_host(condition: bool) -> None:
    for names in (("centre", "total", "hidden", "seen", "flat"), tuple(Assigning()._buffers)):
        model = Assigning()
        model(draw())
        snapshot, before = BufferSnapshot(model), copy_buffers(model)
        snapshot.take()
        changed = copy.deepcopy(model)
        changed(2 * draw())
        for name in names:
            setattr(model, name, changed._buffers[name])
        after = copy_buffers(model)
        snapshot.restore_unless(torch.tensor(condition))
        assert copy_buffers(model) == (after if condition else before)


def test_restoring_does_not_write_to_what_was_assigned() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("average", torch.zeros(3, 3))
    snapshot = BufferSnapshot(model)
    snapshot.take()
    weight = model.weight.detach().clone()
    model.average = model.weight.detach()
    snapshot.restore_unless(torch.tensor(False))
    assert not model.average.any()
    assert torch.equal(model.weight, weight)


# Padding
@pytest.mark.parametrize("kind", [DdpReplica, ExactReplica])
@pytest.mark.usefixtures("process_group")
def test_padding_changes_no_buffer(kind: type) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Registers())
    if kind is DdpReplica:
        model.append(nn.Sequential(nn.Linear(1, 3), Assigning()))
        model(draw())
    replica = make_replica(model, kind)
    before = copy_buffers(model)
    update(replica, draw(1), is_padding=True)
    after = copy_buffers(model)
    assert {name: after[name] for name in before} == before


# Exact mode
class Shared(nn.Module):
    """Its assigned buffers depend on the micro-batch, which a shard of the batch is."""

    def __init__(self, grown: str = "", *, persistent: bool = False) -> None:
        super().__init__()
        self.out = nn.Linear(3, 1)
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(1), persistent=persistent)
        self.grown = grown

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.centre = 0.5 * self.centre + x.mean(0)
            self.seen = self.seen + len(x)
            if self.grown:
                self.cache = torch.zeros(len(x))
        return self.out(x - self.centre)


EXACT = replace(RUN, elastic=ElasticConfig(exact=True, shards=2))


@pytest.mark.usefixtures("process_group")
def test_exact_mode_averages_assigned_buffers_over_shards() -> None:
    model = Shared(grown="yes")
    replica = make_replica(model, ExactReplica, EXACT)
    first, second = draw(4), draw(5)
    for number in (1, 2):
        update(replica, first, shard=0, last=False)
        update(replica, second, shard=1)
        replica.step(0.1, None, 1.0, None)
        mean = (first.mean(0) + second.mean(0)) / 2
        assert torch.allclose(model.centre, mean if number == 1 else 1.5 * mean)
        assert int(model.seen) == 4 * number, "a counter is that of shard 0"
        assert model.cache.shape == (1,), "a cache starts anew in each shard"


@pytest.mark.usefixtures("process_group")
def test_exact_mode_refuses_a_saved_buffer_that_grows() -> None:
    replica = make_replica(Shared(grown="yes", persistent=True), ExactReplica, EXACT)
    with pytest.raises(
        UsageError, match=r"^elastic\.exact=true: the buffer cache changed its shape or dtype in an update"
    ):
        update(replica, draw())


@pytest.mark.usefixtures("process_group")
def test_exact_mode_validates_without_changing_buffers() -> None:
    model = Registers()
    replica = make_replica(model, ExactReplica, EXACT)
    with torch.no_grad():
        replica.compute_loss(lambda model, batch: Loss(model(batch).sum(), 1), draw())
    assert copy_buffers(model) == {}, "each rank has other batches"


# Recomputation
class Block(nn.Module):
    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.linear, self.in_place = nn.Linear(3, 3), in_place
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale * (1 + x.detach().abs().mean())
        if self.in_place:
            self.scale.copy_(scale)
        else:
            self.scale = scale
        return torch.tanh(self.linear(x) * scale)


@pytest.mark.parametrize("in_place", [False, True])
def test_recomputation_sees_the_buffers_of_the_first_pass(in_place: bool) -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(Block(in_place=in_place), Block(in_place=in_place)))
    apply_activation_checkpointing(list(nets[1]))
    for net in nets:
        (net(draw(4)).sum() + net(draw(5)).sum()).backward()  # each block is called twice before it is recomputed
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert copy_buffers(nets[0]) == copy_buffers(nets[1])


# Other ranks
def run_on_two_ranks(target: Callable[[int], Any], folder: Path) -> list[Any]:
    """Run in two forked processes with a process group, and return their results by rank."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
        results.put((rank, target(rank)))
        dist.barrier()
        dist.destroy_process_group()

    processes = [context.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [value for _, value in sorted(results.get() for _ in processes)]


class Layouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("assigned", torch.zeros(2, 3))
        self.register_buffer("grown", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("only_on_0", None)
        self.register_buffer("only_on_1", None)
        self.register_buffer("last", torch.zeros(1))


def exchange_layouts(rank: int) -> dict[str, Any]:
    model = Layouts()
    model.assigned = torch.full((3, 2), 1.0 + rank).t()
    model.grown = torch.full((2 + rank,), 1.0 + rank)
    model.cache = torch.full((2 + rank,), 1.0 + rank)
    if rank == 0:
        model.only_on_0 = torch.ones(2)
        model.register_buffer("later", torch.ones(1))
    else:
        model.only_on_1 = torch.ones(2)
    model.last = torch.full((1,), 1.0 + rank)
    synchronize_buffers(model, CPU)
    return copy_buffers(model)


def test_ranks_take_the_buffers_of_rank_0_whatever_their_shapes(tmp_path: Path) -> None:
    first, second = run_on_two_ranks(exchange_layouts, tmp_path)
    assert first.pop(".cache") == ("torch.float32", [1.0, 1.0])
    assert second.pop(".cache") == ("torch.float32", [2.0, 2.0, 2.0]), "a cache follows the data of its own rank"
    assert first == second
    assert first[".assigned"] == ("torch.float32", [[1.0] * 3] * 2)
    assert first[".grown"] == ("torch.float32", [1.0, 1.0])
    assert first[".last"] == ("torch.float32", [1.0])
    assert first[".later"] == ("torch.float32", [1.0])
    assert first[".only_on_1"] is None


# Checkpoints
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [DdpReplica, FsdpReplica])
def test_buffers_that_changed_their_shape_are_resumed(kind: type, tmp_path: Path) -> None:
    new_model = Assigning().state_dict()
    replica = make_replica(Assigning(), kind)
    for _ in range(2):
        update(replica, draw())
        replica.step(0.1, None, 1.0, None)
    model, optimizer, facts = replica.full_state()
    state = CheckpointState(model, optimizer, {"samples": 8, "update": 2}, {}, 1, facts)
    loaded = load_checkpoint(open_checkpoint(save_checkpoint(tmp_path, "update-2", state, SaveOptions(1)).path))
    check_tensor_names(loaded.manifest, new_model)
    resumed = make_replica(Assigning(), kind)
    resumed.restore(loaded.model, loaded.optimizer, loaded.manifest.facts)
    expected = copy_buffers(replica.module) | {".hidden": ("torch.float32", [0.0, 0.0, 0.0])}
    assert copy_buffers(resumed.module) == expected
    for one in (replica, resumed):
        update(one, draw())
        one.step(0.1, None, 1.0, None)
    again, expected = copy_buffers(resumed.module), copy_buffers(replica.module)
    assert again | {".hidden": None} == expected | {".hidden": None}
    with pytest.raises(UsageError, match=r"centre is float32\[3\] in the checkpoint, not float32\[4\]"):
        check_tensor_names(loaded.manifest, {**new_model, "centre": torch.zeros(4)})
    with pytest.raises(UsageError, match=r"history is float32\[0, 3\] in the checkpoint, not float32\[0, 4\]"):
        check_tensor_names(loaded.manifest, {**new_model, "history": torch.zeros(0, 4)})


def test_modules_are_listed_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update looks at the buffers several times; every way to change the modules is seen."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    listed: list[nn.Module] = []
    list_modules = buffers.list_modules
    monkeypatch.setattr(buffers, "list_modules", lambda model: (listed.append(model), list_modules(model))[1])
    snapshot = BufferSnapshot(model)
    for _ in range(3):
        snapshot.take()
        snapshot.restore()
        snapshot.restore_unless(torch.tensor(True))
    assert len(listed) == 1

    def get_names() -> list[str]:
        snapshot.take()
        return [buffer.name for buffer in snapshot.buffers]

    model[0].register_buffer("own", torch.ones(1))
    assert get_names()[0] == "own"
    model[0]._modules["inner"] = nn.BatchNorm1d(2)
    assert len(get_names()) == 7
    model[1] = nn.Identity()
    assert len(get_names()) == 4
    del model[0].inner
    assert get_names() == ["own"]


def test_exact_update_names_no_modules(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    config = replace(RUN, elastic=ElasticConfig(exact=True, shards=2))
    replica = make_replica(model, ExactReplica, config)
    walks: list[nn.Module] = []
    named_modules = nn.Module.named_modules

    def record(self: nn.Module, *args: Any, **keys: Any) -> Any:
        walks.append(self)
        return named_modules(self, *args, **keys)

    for number in range(5):
        if number == 4:  # the search for later parameters looks at the whole model in the updates 1, 2, 4, 8, ...
            monkeypatch.setattr(nn.Module, "named_modules", record)
        for shard in range(2):
            with replica.micro_batch(last=shard == 1, is_padding=False, shard=shard):
                loss = replica.compute_loss(lambda net, x: Loss(net(x).square().sum(), len(x)), draw())
                replica.backward(loss.total, 4)
        replica.step(0.1, None, 1.0, None)
    assert walks == []
    assert int(model[1].num_batches_tracked) == 5
