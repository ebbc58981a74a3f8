"""Parallel strategies (DDP, FSDP2, DeepSpeed, exact): their common protocol, and the selection of one by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launcher.checkpoint import Stored
    from launcher.optim import Groups, Precision
    from launcher.parts import Place
    from launcher.settings import Run
    from launcher.telemetry import StageClock

__all__ = ["LARGE_BYTES", "Given", "Replica", "Shards", "State", "Step", "even", "missing", "prepare", "problems"]

#: Size of the parameters above which ranks other than 0 avoid holding all of them.
LARGE_BYTES = 4 << 30


@dataclass(frozen=True)
class Step:
    """Result of an optimizer step. All fields but `groups` are device scalars and are read one update late.

    `norm` is the norm of the update's mean gradient before clipping, `finite` whether the update was applied. `spread`
    is the sum of |h|²/c over the `groups` parts of the batch whose gradients this rank measured separately (see
    `gauge.GroupGradNorms`).
    """

    norm: torch.Tensor
    finite: torch.Tensor
    spread: torch.Tensor
    groups: int


@dataclass(frozen=True)
class Given:
    """The arguments of `prepare`, from which a replica is built."""

    model: nn.Module
    run: Run
    world: int
    precision: Precision
    clock: StageClock
    groups: Groups | None = None
    blocks: Sequence[nn.Module] = ()


class State(NamedTuple):
    """Model tensors by name, optimizer tensors as `<parameter>/<slot>`, and everything else as JSON values."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class Shards(NamedTuple):
    """Flat ranges of tensors, and the position of each in the whole tensor.

    A tensor without an entry in `places` is complete, and on rank 0 only. Optimizer tensors have entries under their
    own names.
    """

    state: State
    places: Mapping[str, Place]


class Replica(Protocol):
    """One rank's part of the model and its optimizer.

    `model` is passed to the recipe's loss; `module` has the parameter names of `recipe.model()` and is used for
    validation. `sharded`: no rank holds the whole state.
    """

    model: nn.Module
    bare: nn.Module
    optimizer: torch.optim.Optimizer
    sharded: bool

    def micro(self, *, last: bool, pad: bool, place: int) -> AbstractContextManager[None]:
        """Context around one micro-batch's forward and backward. Gradients are communicated in the last one only.

        `shard` identifies the sum that the gradient belongs to: the rank's, or that of the shard it is cut from.
        """

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        """Run backward of `total / samples`, with the samples of the whole update: the loss is divided only here.

        `count` is the loss count of this micro-batch, for the noise scale; 0 if it is not to be measured.
        """

    def measures(self, update: int) -> bool:
        """Whether the noise scale is measured in the update of this index; in every update if that is almost free."""

    def step(self, lr: float, momentum: float | None, rescale: float, clip_norm: float | None) -> Step:
        """Take one optimizer step with learning rate `lr` on gradients times `rescale`; skip non-finite gradients."""

    def rescale_moments(self, factor: float) -> None:
        """Multiply Adam's second moments and AMSGrad's maxima of them by `factor`, after a change of the batch."""

    def settle_buffers(self) -> None:
        """Broadcast rank 0's floating-point buffers (running statistics), before validation and saving."""

    def tensors(self) -> State:
        """The full state, valid on rank 0 only. Collective: every rank must call it.

        Model tensors have the names of `recipe.model().state_dict()`. A sharded strategy gathers one tensor at a time
        into host memory.
        """

    def shards(self) -> Shards:
        """This rank's part of the state, in the replica's own memory (not copied); all parts make up the full state."""

    def restore(self, model: Stored, optimizer: Stored, facts: Mapping[str, Any]) -> None:
        """Load a checkpoint of any strategy and world size. Every rank calls this and reads only what it needs."""


def even(run: Run) -> bool:
    """Whether every rank must run the same number of micro-batches, because each of them communicates."""
    return run.strategy.name == "fsdp" or (run.strategy.name == "deepspeed" and run.strategy.stage >= 2)


def prepare(
    model: nn.Module,
    run: Run,
    world: int,
    precision: Precision,
    clock: StageClock,
    groups: Groups | None = None,
    blocks: Sequence[nn.Module] = (),
) -> Replica:
    """Build the replica for `config.strategy.name`, or the exact one; the model is already on its device.

    `groups`: the recipe's own parameter groups. `blocks`: parts of the model to gather one at a time.
    """
    return kind_of(run)(Given(model, run, world, precision, clock, groups, blocks))


def kind_of(run: Run) -> Callable[[Given], Replica]:
    """The class for the configured strategy; only its module is imported."""
    if run.strategy.name == "fsdp":
        from launcher.strategies.fsdp import FsdpReplica

        return FsdpReplica
    if run.strategy.name == "deepspeed":
        from launcher.strategies.deepspeed import DeepSpeedReplica

        return DeepSpeedReplica
    if run.elastic.exact:
        from launcher.strategies.exact import ExactReplica

        return ExactReplica
    from launcher.strategies.ddp import DdpReplica

    return DdpReplica


def problems(run: Run) -> Iterator[str]:
    """What the configured strategy does not support, one line each, with the fix. Does not import torch."""
    if run.strategy.name == "fsdp":
        from launcher.strategies.fsdp_config import problems as of_fsdp

        yield from of_fsdp(run)
    if run.strategy.name == "deepspeed":
        from launcher.strategies.zero_config import problems as of_deepspeed

        yield from of_deepspeed(run)


def missing(run: Run) -> str | None:
    """What the configured strategy needs and this machine lacks, with the fix; None if nothing. No torch import."""
    if run.strategy.name == "deepspeed":
        from launcher.strategies.zero_config import missing as of_deepspeed

        return of_deepspeed()
    return None
