"""The interface between the training loop and a strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from launcher.checkpoint.sharded import TensorSlice
    from launcher.checkpoint.tensor_io import LazyTensors
    from launcher.config.schema import RunConfig
    from launcher.recipe import Loss
    from launcher.strategies.loss_module import LossFn
    from launcher.strategies.optimizer import ParamGroupsFn
    from launcher.strategies.precision import Precision
    from launcher.telemetry.stage_clock import StageClock
    from launcher.telemetry.stats_fields import StatsRow

__all__ = [
    "LARGE_MODEL_BYTES",
    "ReformableReplica",
    "Replica",
    "ReplicaArgs",
    "ReplicaState",
    "ShardedState",
    "StepResult",
]


#: Size of the parameters above which ranks other than 0 avoid holding all of them.
LARGE_MODEL_BYTES = 4 << 30


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step. `groups` is a number, and the others are too on a CPU, where the host has them.

    On another device these are scalars there, which are read one update late.

    `norm` is the norm of the update's mean gradient before clipping, `finite` whether the update was applied.
    `group_sq_norm_sum`: this rank's batch is cut into `groups` parts whose gradients are measured separately for the
    noise scale (`gradient_norms.GroupGradNorms`); the sum of each part's squared gradient norm over its loss count.
    """

    norm: torch.Tensor | float
    finite: torch.Tensor | bool
    group_sq_norm_sum: torch.Tensor | float
    groups: int


@dataclass(frozen=True)
class ReplicaArgs:
    """What a replica is built from.

    `groups`: the recipe's own parameter groups. `blocks`: parts of the model to gather one at a time.
    """

    model: nn.Module
    config: RunConfig
    world: int
    precision: Precision
    clock: StageClock
    groups: ParamGroupsFn | None = None
    blocks: Sequence[nn.Module] = ()


class ReplicaState(NamedTuple):
    """Model tensors by name, optimizer tensors as `<parameter>/<slot>`, and everything else as JSON values."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


class ShardedState(NamedTuple):
    """Flat ranges of tensors, and the position of each in the whole tensor.

    A tensor without an entry in `slices` is complete, and on rank 0 only. Optimizer tensors have entries under their
    own names.
    """

    state: ReplicaState
    slices: Mapping[str, TensorSlice]


class Replica(Protocol):
    """One rank's part of the model and its optimizer.

    `module` is the recipe's own model. `sharded`: no rank holds the whole state. `decides_on_host`: `step` takes the
    loss normalizer as a number, for which the host waits: under ZeRO and in exact mode.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    sharded: bool
    decides_on_host: bool

    def micro_batch(self, *, last: bool, is_padding: bool, shard: int) -> AbstractContextManager[None]:
        """Context around one micro-batch's forward and backward. Gradients are communicated in the last one only.

        `is_padding`: the micro-batch only equalises the number of collectives, and its gradient is zero. `shard`: the
        rank, or under elastic.exact the virtual shard, whose gradients are summed separately.
        """

    def compute_loss(self, loss_fn: LossFn, batch: Any) -> Loss:
        """Call the recipe's loss with its own model, whose methods and parts it may use, within the strategy's wrapper.

        With gradients, `total` is a scalar tensor, `count` a number, and the backward pass of a loss that counts
        nothing is part of the reduction. Without, as in validation, nothing is prepared for a backward pass.

        Raises:
            TrainingFailed: with gradients, loss() returned what cannot be trained on.
        """

    def backward(self, total: torch.Tensor, samples: int, count: float = 0.0) -> None:
        """Run backward of `total / samples`, with the samples of the whole update: the loss is divided only here.

        `count` is the loss count of this micro-batch, for the noise scale; 0 if it is not to be measured.
        """

    def send_stats(self, row: StatsRow) -> None:
        """Before the last backward pass of an update: start to exchange this rank's row of statistics."""

    def receive_stats(self) -> torch.Tensor:
        """After it: the rows of all ranks in float64 on the device. The host does not wait for it.

        They have the shape (world, words, fields): a number is the sum of its words.
        """

    def exchange_stats(self, row: StatsRow) -> torch.Tensor:
        """Exchange rows outside of a backward pass. Collective."""

    def measures_noise_at(self, update: int) -> bool:
        """Whether the noise scale is measured in the update of this index; in every update if that is almost free."""

    def step(
        self, lr: float, momentum: float | None, loss_normalizer: float | torch.Tensor, clip_norm: float | None
    ) -> StepResult:
        """Take one optimizer step with learning rate `lr` on gradients x `loss_normalizer`; skip non-finite ones.

        Unless `decides_on_host`, the normalizer may be a scalar on the device. If it is infinite, the loss counted
        nothing, and parameters, moments and buffers are as after `discard_update`.
        """

    def discard_update(self) -> StepResult:
        """Take no step, since the loss counts nothing on any rank: parameters and moments stay, gradients are dropped.

        Buffers keep what the forward passes made of them. `norm` is NaN, and `finite` true: nothing failed.
        """

    def pop_later_parameters(self) -> list[str]:
        """Parameters found since the last call that need a gradient but were frozen or absent at the start."""

    def pop_call_order(self) -> float:
        """A number for the order in which the update's forward passes called the parts of a sharded model; else 0."""

    def rescale_moments(self, factor: float) -> None:
        """Multiply Adam's second moments and AMSGrad's maxima of them by `factor`, after a change of the batch."""

    def broadcast_buffers(self) -> None:
        """Broadcast rank 0's floating-point buffers (running statistics), before validation and saving."""

    def full_state(self) -> ReplicaState:
        """The full state, valid on rank 0 only. Collective: every rank must call it.

        Model tensors have the names of `recipe.model().state_dict()`. A sharded strategy gathers one tensor at a time
        into host memory.
        """

    def sharded_state(self) -> ShardedState:
        """This rank's part of the state, in the replica's own memory (not copied); all parts make up the full state."""

    def restore(self, model: LazyTensors, optimizer: LazyTensors, facts: Mapping[str, Any]) -> None:
        """Load a checkpoint of any strategy and world size. Every rank calls this and reads only what it needs."""


class ReformableReplica(Replica, Protocol):
    """A replica that can go on in another process group: every rank holds the whole state, under DDP or in exact mode.

    After a rank is lost, `leave_group`; destroy the process group and form another; `reform`.
    """

    def leave_group(self) -> None:
        """Give up an update that was interrupted, and let go of the process group, before it is destroyed.

        Gradients and statistics of the update are dropped, and the buffers are as they were before it; if no update was
        in progress, they stay. Unless every rank lets go of a group whose collective failed, others may wait in it.
        """

    def reform(self, world: int) -> None:
        """Go on in the new default process group, of `world` ranks; none is needed for one rank.

        The model and the optimizer stay the same objects, with their state as it is: nothing is sent.
        """
