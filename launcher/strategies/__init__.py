"""How the model lies on the workers: one protocol, and the only place where a strategy is chosen by name."""

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

#: Of parameters: beyond it no rank holds all of them without need.
LARGE_BYTES = 4 << 30


@dataclass(frozen=True)
class Step:
    """What an optimizer's step found out. All but `groups` are device scalars and are read an update late.

    `norm` is the norm of the update's mean gradient before clipping, `finite` whether it was applied. `spread` is the
    sum of |h|²/c over `groups` parts of the batch whose gradients this rank saw by themselves (`gauge.Gauge`).
    """

    norm: torch.Tensor
    finite: torch.Tensor
    spread: torch.Tensor
    groups: int


@dataclass(frozen=True)
class Given:
    """What a replica is made of, as `prepare` has it."""

    model: nn.Module
    run: Run
    world: int
    precision: Precision
    clock: StageClock
    groups: Groups | None = None
    blocks: Sequence[nn.Module] = ()


class State(NamedTuple):
    """Model tensors by name, optimizer tensors as `<parameter>/<slot>`, and the rest as JSON facts."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class Shards(NamedTuple):
    """Flat ranges of tensors, and where each lies in the whole; a tensor without a place is whole, and on rank 0 only.

    Optimizer tensors have their places under their own names.
    """

    state: State
    places: Mapping[str, Place]


class Replica(Protocol):
    """One rank's share of the model and its optimizer.

    `model` is what the recipe's loss is called with; `bare` has the names of `recipe.model()` and is what is validated.
    `sharded`: no rank holds the whole state.
    """

    model: nn.Module
    bare: nn.Module
    optimizer: torch.optim.Optimizer
    sharded: bool

    def micro(self, *, last: bool, pad: bool, place: int) -> AbstractContextManager[None]:
        """Round one micro-batch's forward and backward. Gradients travel in the last one only.

        `place` is whose sum it belongs to: the rank's, or that of the shard it is cut from.
        """

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        """Backward of `total / samples`, `samples` those of the whole update: the only division of a loss.

        `count` is what this micro-batch's loss counts, for the noise scale; 0 where it is not to be measured.
        """

    def measures(self, update: int) -> bool:
        """Whether the noise is measured in the update of this index: in each, where that costs next to nothing."""

    def step(self, lr: float, momentum: float | None, rescale: float, clip_norm: float | None) -> Step:
        """One optimizer step at rate `lr` on gradients times `rescale`, skipped where they are not finite."""

    def rescale_moments(self, factor: float) -> None:
        """Multiply Adam's second moments, and AMSGrad's maxima of them, where the batch has changed."""

    def settle_buffers(self) -> None:
        """Give every rank rank 0's floating buffers (running statistics), before validation and saving."""

    def tensors(self) -> State:
        """The whole state. Every rank calls it, and rank 0 has it; what the others get is for nobody's use.

        Model tensors have the names of `recipe.model().state_dict()`. A strategy that shards gathers tensor by tensor,
        into the machine's memory.
        """

    def shards(self) -> Shards:
        """This rank's part of the state, in memory of the replica's own; all ranks' parts make up the whole."""

    def restore(self, model: Stored, optimizer: Stored, facts: Mapping[str, Any]) -> None:
        """Take over a checkpoint, of any strategy and world size. Every rank calls it and reads what it needs."""


def even(run: Run) -> bool:
    """Whether every rank makes the same number of micro-batches, since each of them communicates."""
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
    """The replica of `run.strategy.name`, or the exact one; the model is on its device already.

    `groups`: the recipe's own parameter groups. `blocks`: parts of the model to gather one at a time.
    """
    return kind_of(run)(Given(model, run, world, precision, clock, groups, blocks))


def kind_of(run: Run) -> Callable[[Given], Replica]:
    """Only the module of the strategy that is asked for is imported."""
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
    """What the run's strategy cannot do, each in one line with its mend. Needs no torch."""
    if run.strategy.name == "fsdp":
        from launcher.strategies.fsdp_config import problems as of_fsdp

        yield from of_fsdp(run)
    if run.strategy.name == "deepspeed":
        from launcher.strategies.zero_config import problems as of_deepspeed

        yield from of_deepspeed(run)


def missing(run: Run) -> str | None:
    """What the run's strategy needs and this machine lacks, with its mend. Needs no torch."""
    if run.strategy.name == "deepspeed":
        from launcher.strategies.zero_config import missing as of_deepspeed

        return of_deepspeed()
    return None
