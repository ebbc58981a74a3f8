"""What modules return from get_extra_state() is saved, restored and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from launcher.checkpoint.manifest import open_checkpoint
from launcher.checkpoint.tensor_io import (
    CheckpointState,
    SaveOptions,
    export_safetensors,
    load_checkpoint,
    save_checkpoint,
)
from launcher.config.schema import RunConfig
from launcher.recipe import Loss
from launcher.strategies.ddp import DdpReplica
from launcher.strategies.extra_state import load_exported_model, make_extra_metadata
from launcher.strategies.interface import ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.telemetry.stage_clock import HostTimer, StageClock


class Scaled(nn.Module):
    """As a quantised layer: a history of maxima, and a scale that the next updates depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 1)
        self.updates = 0
        self.maxima: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.updates += 1
            self.maxima = [*self.maxima, x.abs().max()][-2:]
        return self.out(x) / (1 + self.updates + sum(float(value) for value in self.maxima))

    def get_extra_state(self) -> Any:
        return {"updates": self.updates, "maxima": self.maxima}

    def set_extra_state(self, state: Any) -> None:
        self.updates, self.maxima = state["updates"], state["maxima"]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), Scaled())


def make_replica() -> DdpReplica:
    precision, clock = Precision.from_name("fp32", torch.device("cpu")), StageClock(HostTimer())
    return DdpReplica(
        ReplicaArgs(make_model(), RunConfig(optimizer={"_target_": "torch.optim.SGD"}), 1, precision, clock)
    )


def train_update(replica: DdpReplica, update: int) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(update))
    with replica.micro_batch(last=True, is_padding=False, shard=0):
        loss = replica.compute_loss(lambda model, batch: Loss(model(batch).square().sum(), 4), x)
        replica.backward(loss.total, 4)
    replica.step(0.1, None, 1.0, None)


def test_extra_state_is_restored_and_exported(tmp_path: Path) -> None:
    replica, fresh = make_replica(), make_replica()
    for update in range(3):
        train_update(replica, update)
    model, optimizer, facts = replica.full_state()
    assert "1._extra_state" not in model
    state = CheckpointState(model, optimizer, {"samples": 1}, {}, 1, facts)
    loaded = load_checkpoint(open_checkpoint(save_checkpoint(tmp_path, "one", state, SaveOptions(keep=1)).path))
    fresh.restore(loaded.model, loaded.optimizer, loaded.manifest.facts)
    assert fresh.module[1].updates == 3
    assert all(map(torch.equal, fresh.module[1].maxima, replica.module[1].maxima))
    metadata = make_extra_metadata(loaded.manifest.facts["extra"], loaded.optimizer)
    export_safetensors(tmp_path / "model.safetensors", loaded.model, {}, metadata)
    exported = make_model()
    load_exported_model(exported, tmp_path / "model.safetensors")
    x = torch.ones(2, 3)
    assert torch.equal(exported.eval()(x), replica.module.eval()(x))
    fresh.module.train()
    replica.module.train()
    for one in (replica, fresh):
        train_update(one, 3)
    assert torch.equal(fresh.module[1].out.weight, replica.module[1].out.weight)


def test_file_without_the_extra_state_is_refused_when_strict(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {name: tensor for name, tensor in make_model().state_dict().items() if "extra" not in name}
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(RuntimeError, match=r"missing in the file: \['1\._extra_state'\]"):
        load_exported_model(make_model(), tmp_path / "plain.safetensors")
    missing, unexpected = load_exported_model(make_model(), tmp_path / "plain.safetensors", strict=False)
    assert (list(missing), unexpected) == (["1._extra_state"], [])
