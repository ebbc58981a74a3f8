"""Build the replica of the configured strategy; only the module of that strategy is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.strategies.interface import Replica, ReplicaArgs

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

__all__ = ["build_replica"]


def build_replica(args: ReplicaArgs) -> Replica:
    """Build the replica for `config.strategy.name`, or the exact one; the model is already on its device."""
    return get_replica_class(args.config)(args)


def get_replica_class(config: RunConfig) -> Callable[[ReplicaArgs], Replica]:
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
