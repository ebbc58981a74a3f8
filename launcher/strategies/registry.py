"""Parallel strategies (DDP, FSDP2, DeepSpeed, exact): their common protocol, and the selection of one by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from launcher.strategies.interface import ReplicaArgs, ReplicaProtocol

if TYPE_CHECKING:
    from torch import nn

    from launcher.config.schema import RunConfig
    from launcher.strategies.optimizer import ParamGroupsFn
    from launcher.strategies.precision import Precision
    from launcher.telemetry.stage_clock import StageClock

__all__ = ["build_replica"]


def build_replica(
    model: nn.Module,
    config: RunConfig,
    world: int,
    precision: Precision,
    clock: StageClock,
    groups: ParamGroupsFn | None = None,
    blocks: Sequence[nn.Module] = (),
) -> ReplicaProtocol:
    """Build the replica for `config.strategy.name`, or the exact one; the model is already on its device.

    `groups`: the recipe's own parameter groups. `blocks`: parts of the model to gather one at a time.
    """
    return replica_class(config)(ReplicaArgs(model, config, world, precision, clock, groups, blocks))


def replica_class(config: RunConfig) -> Callable[[ReplicaArgs], ReplicaProtocol]:
    """The class for the configured strategy; only its module is imported."""
    if config.strategy.name == "fsdp":
        from launcher.strategies.fsdp import FsdpReplica

        return FsdpReplica
    if config.strategy.name == "deepspeed":
        from launcher.strategies.deepspeed import DeepSpeedReplica

        return DeepSpeedReplica
    if config.elastic.exact:
        from launcher.strategies.exact import ExactReplica

        return ExactReplica
    from launcher.strategies.ddp import DdpReplica

    return DdpReplica
