"""The code of the workers in test_reform.py: three train, one is lost in the middle of an update, the others go on.

`python reform_cases.py FOLDER PORT WORKER CASE…` runs the cases as one of the workers 0 to 2, or as 3, who is new. In
the case `killed` worker 1 ends by SIGKILL, and 3 takes its place; in the others worker 1 raises an error and comes back
with a new replica. The outcomes are in FOLDER/WORKER.json.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from launcher.checkpoint.tensor_io import LazyTensors, view_as_bytes
from launcher.config.schema import ElasticConfig, RunConfig, StrategyConfig
from launcher.distributed.rendezvous import init_process_group
from launcher.recipe import Loss
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.telemetry.stats_fields import NUM_STATS
from launcher.topology import Topology
from launcher.train.state_transfer import transfer_state

SAMPLES, MICRO_BATCHES, SHARDS = 12, 2, 4
LOST, NEW = 1, 3
FIRST_LATE_UPDATE = 5  # from which on `late` is used, where that is possible
CASES = ("ddp", "ddp find_unused_parameters", "ddp static_graph", "exact", "killed")


class Model(nn.Module):
    """BatchNorm, tied and frozen parameters, a cache that every forward pass assigns, and a part that is used late."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.norm, self.mid, self.tied = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.mid.weight
        self.late, self.dec, self.frozen = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor, *, late: bool) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.enc(x)))
        self.mean = hidden.detach().mean(dim=0) + self.mean / 2
        hidden = torch.tanh(self.tied(torch.tanh(self.mid(hidden))))
        output: torch.Tensor = self.frozen(self.dec(hidden + self.late(hidden) if late else hidden))
        return output


class Interrupted(RuntimeError):
    """What ends an update on the worker that is lost, unless it is killed."""


class Worker:
    """One of the workers, in one case."""

    def __init__(self, case: str, store: dist.Store, worker: int) -> None:
        self.strategy = "ddp" if case == "killed" else case
        self.is_killed = case == "killed"
        self.store, self.worker = store, worker
        self.rank, self.world = 0, 1
        self.results: dict[str, Any] = {}

    # --- the replica and its group --------------------------------------------------------------------------------

    def make_replica(self, world: int) -> Any:
        torch.manual_seed(7)
        name, *options = self.strategy.split()
        config = replace(RunConfig(), optimizer={"_target_": "torch.optim.Adam"})
        if name == "exact":
            config = replace(config, elastic=ElasticConfig(exact=True, shards=SHARDS))
        else:
            settings: dict[str, Any] = dict.fromkeys(options, True)
            config = replace(config, strategy=StrategyConfig(name="ddp", **settings))
        precision = Precision.from_name("fp32", torch.device("cpu"))
        return build_replica(ReplicaArgs(Model(), config, world, precision, StageClock(HostTimer())))

    def form_group(self, name: str, members: list[int]) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self.rank, self.world = members.index(self.worker), len(members)
        if self.world > 1:
            place, store = Topology(rank=self.rank, world=self.world), dist.PrefixStore(name, self.store)
            init_process_group(store, place, torch.device("cpu"), "gloo", timeout_s=300.0)

    def go_on(self, replica: Any, name: str, members: list[int]) -> None:
        replica.leave_group()
        self.form_group(name, members)
        replica.reform(self.world)

    # --- training ---------------------------------------------------------------------------------------------------

    def list_parts(self) -> list[tuple[int, range]]:
        """The shard and the samples of each of this rank's micro-batches."""
        if self.strategy != "exact":
            size = SAMPLES // self.world // MICRO_BATCHES
            first = self.rank * size * MICRO_BATCHES
            return [(self.rank, range(first + n * size, first + (n + 1) * size)) for n in range(MICRO_BATCHES)]
        ranks = max(count for count in (1, 2, 4) if count <= self.world)
        own = range(SHARDS)[self.rank * SHARDS // ranks : (self.rank + 1) * SHARDS // ranks]
        size = SAMPLES // SHARDS
        return [(shard, range(shard * size, (shard + 1) * size)) for shard in own]

    def train_update(self, replica: Any, update: int) -> list[float]:
        """Train one update; the norm of its gradient and what it shows of the noise."""
        parts = self.list_parts()
        late = update >= FIRST_LATE_UPDATE if self.strategy in ("ddp find_unused_parameters", "exact") else True
        generator = torch.Generator().manual_seed(update)
        x, y = torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, 2, generator=generator)
        row = [float(update * 10 + self.rank)] * NUM_STATS
        for number, (shard, samples) in enumerate(parts or [(0, range(2))]):
            last = number == max(len(parts), 1) - 1
            with replica.micro_batch(last=last, is_padding=not parts, shard=shard):
                batch = x[list(samples)], y[list(samples)]
                loss = replica.compute_loss(partial(compute_loss, late), batch)
                if last:
                    replica.send_stats(row)
                replica.backward(loss.total, SAMPLES, len(samples))
        table = replica.receive_stats().sum(dim=1)
        assert table.tolist() == [[float(update * 10 + rank)] * NUM_STATS for rank in range(self.world)]
        result = replica.step(0.01, None, 1.0, None)
        return [float(result.norm), float(result.group_sq_norm_sum), result.groups]

    def interrupt_update(self, replica: Any, update: int) -> str:
        """Begin an update in which the worker LOST ends; the kind of the error on the others."""

        def end(_: torch.Tensor) -> None:
            if self.is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Interrupted

        handle = replica.module.enc.weight.register_hook(end) if self.worker == LOST else None
        try:
            self.train_update(replica, update)
        except RuntimeError as error:
            return type(error).__name__
        finally:
            if handle is not None:
                handle.remove()
        raise AssertionError("the update was not interrupted")

    # --- what happens -----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        replica = self.join_later() if self.worker == NEW else self.train_until_lost()
        self.go_on(replica, "three again", [0, 2, NEW if self.is_killed else LOST])
        is_new = self.rank == 2
        facts = transfer_state(replica, {"update": 4 * (not is_new)}, source=0, is_behind=is_new)
        assert facts == {"update": 4}
        for update in (4, 5):
            self.train_update(replica, update)
        replica.broadcast_buffers()
        self.results["joined"] = compute_digest(copy_state(replica))
        if is_new:
            replica.leave_group()
        else:
            self.shrink_and_grow(replica)
        dist.destroy_process_group()
        return self.results

    def join_later(self) -> Any:
        """Build a replica, and wait for the others."""
        replica = self.make_replica(1)
        self.store.wait(["lost"], timedelta(seconds=600))
        return replica

    def train_until_lost(self) -> Any:
        """Train with three workers, and on the ones that are left with two: until the other comes back."""
        self.form_group("three", [0, 1, 2])
        replica = self.make_replica(3)
        for update in (0, 1):
            self.train_update(replica, update)
        before = copy_state(replica)
        held = [weakref.ref(dist.group.WORLD), weakref.ref(replica._stats)]
        if self.strategy != "exact":  # which has no wrapper
            held += [weakref.ref(replica._wrapped.reducer), weakref.ref(replica._bucket_stats.words)]
        gc.disable()
        self.results["error"] = self.interrupt_update(replica, 2)
        if self.worker == LOST:
            replica.leave_group()
            dist.destroy_process_group()
            gc.enable()
            return self.make_replica(1)
        self.store.set("lost", "")
        optimizer = replica.optimizer
        self.go_on(replica, "two", [0, 2])
        self.results["freed"] = [reference() is None for reference in held]
        gc.enable()
        self.results["kept"] = compute_digest(copy_state(replica)) == compute_digest(before)
        self.results["dropped"] = all(p.grad is None for p in replica.module.parameters())
        self.results["same optimizer"] = replica.optimizer is optimizer
        self.compare(replica, before, [2, 3])
        return replica

    def shrink_and_grow(self, replica: Any) -> None:
        """From three workers to two, one, and two again; the one that left is an update behind."""
        self.go_on(replica, "two again", [0, 2])
        self.train_update(replica, 6)
        before = copy_state(replica)
        if self.rank == 0:
            self.go_on(replica, "one", [0])
            self.compare(replica, before, [7])
        self.go_on(replica, "two at last", [0, 2])
        hooks = [p._backward_hooks for p in replica.module.parameters()]
        self.results["no hooks"] = not any(hooks)
        transfer_state(replica, {}, source=0, is_behind=self.rank == 1)
        self.train_update(replica, 8)
        replica.broadcast_buffers()
        replica.leave_group()
        self.results["end"] = compute_digest(copy_state(replica))

    def compare(self, replica: Any, before: Any, updates: list[int]) -> None:
        """Train, and compare with a new replica that was restored from `before` in the same group."""
        measured = [self.train_update(replica, update) for update in updates]
        other = self.make_replica(self.world)
        restore(other, before)
        expected = [self.train_update(other, update) for update in updates]
        equal = compute_digest(copy_state(replica)) == compute_digest(copy_state(other)) and measured == expected
        self.results[f"equal to a restart with {self.world}"] = equal
        self.results[f"groups with {self.world}"] = [groups for _, _, groups in measured]
        reference = weakref.ref(other)
        del other
        gc.collect()
        self.results[f"dropped replica is freed with {self.world}"] = reference() is None


def compute_loss(late: bool, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
    x, y = batch
    return Loss(mse_loss(model(x, late=late), y, reduction="sum"), len(x))


def train_alone(updates: int) -> str:
    """The digest of an exact run that nothing disturbs."""
    worker = Worker("exact", dist.HashStore(), 0)
    replica = worker.make_replica(1)
    for update in range(updates):
        worker.train_update(replica, update)
    return compute_digest(copy_state(replica))


# --- state --------------------------------------------------------------------------------------------------------


def copy_state(replica: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]:
    model, optimizer, facts = replica.full_state()
    copies = ({name: tensor.detach().clone() for name, tensor in group.items()} for group in (model, optimizer))
    return *copies, json.dumps(facts)  # type: ignore[return-value]


def restore(replica: Any, state: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]) -> None:
    *groups, facts = state
    replica.restore(*(make_lazy(group) for group in groups), json.loads(facts))  # type: ignore[arg-type]


def make_lazy(tensors: Mapping[str, torch.Tensor]) -> LazyTensors:
    index = {name: {"name": name, "shape": list(tensor.shape), "aliases": []} for name, tensor in tensors.items()}
    return LazyTensors(lambda facts: tensors[facts["name"]].clone(), index)


def compute_digest(state: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]) -> str:
    model, optimizer, facts = state
    digest = hashlib.sha256(facts.encode())
    for name, tensor in [*model.items(), *optimizer.items()]:
        digest.update(name.encode() + bytes(view_as_bytes(tensor)))
    return digest.hexdigest()


def main(folder: Path, port: int, worker: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    server = dist.TCPStore("127.0.0.1", port, is_master=False)
    outcomes = {}
    for case in cases:
        print(case, flush=True)
        outcomes[case] = Worker(case, dist.PrefixStore(case, server), worker).run()
        torch.use_deterministic_algorithms(False)
    if worker == 0:
        outcomes["alone"] = {"end": train_alone(9)}
    (folder / f"{worker}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
