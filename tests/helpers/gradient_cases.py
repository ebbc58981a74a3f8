"""The code of both ranks in test_missing_gradients.py: each case trains on two ranks, and on one for comparison.

`python gradient_cases.py FOLDER RANK NAME…` runs the named cases; the outcomes are in FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from launcher.config.schema import ElasticConfig, RunConfig, StrategyConfig
from launcher.recipe import Loss
from launcher.strategies.activation_checkpointing import find_blocks
from launcher.strategies.interface import Replica, ReplicaArgs
from launcher.strategies.precision import Precision
from launcher.strategies.registry import build_replica
from launcher.telemetry.stage_clock import HostTimer, StageClock
from launcher.telemetry.stats_fields import NUM_STATS

WORLD, MICRO_BATCHES, SIZE, UPDATES = 2, 2, 3, 4
SAMPLES = WORLD * MICRO_BATCHES * SIZE


class Parts(nn.Module):
    """A model with methods and attributes of its own, a head that a loss may leave out, and blocks in a list."""

    temperature = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec, self.aux = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.enc(x)) * self.scale

    def forward(self, x: torch.Tensor, aux: bool = True, blocks: int = 3) -> torch.Tensor:
        hidden = self.encode(x)
        for block in self.blocks[:blocks]:
            hidden = torch.tanh(block(hidden))
        return self.dec(hidden) + self.aux(hidden) if aux else self.dec(hidden)


@dataclass(frozen=True)
class At:
    """Where a micro-batch is."""

    update: int
    rank: int
    micro: int

    @property
    def last_micro(self) -> bool:
        return self.micro == MICRO_BATCHES - 1


def use_whole(model: Parts, x: torch.Tensor, _: At) -> torch.Tensor:
    return model(x)


def use_parts(model: Parts, x: torch.Tensor, _: At) -> torch.Tensor:
    hidden = model.encode(x) / model.temperature
    for block in model.blocks:
        hidden = hidden + block(hidden)
    return model.dec(hidden) + model.aux(hidden)


def use_aux_if(condition: Callable[[At], bool]) -> Callable[[Parts, torch.Tensor, At], torch.Tensor]:
    return lambda model, x, at: model(x, aux=condition(at))


def freeze_aux_later(model: Parts, x: torch.Tensor, at: At) -> torch.Tensor:
    model.aux.requires_grad_(at.update < 2)
    return model(x)


def use_twice_reentrant(model: Parts, x: torch.Tensor, _: At) -> torch.Tensor:
    hidden = model.encode(x)
    for _repeat in range(2):
        for block in model.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=True)
    return model.dec(hidden) + model.aux(hidden)


def fewer_blocks_on_rank_1(model: Parts, x: torch.Tensor, at: At) -> torch.Tensor:
    return model(x, blocks=3 - (at.update == 1) * at.rank)


def leave_out_target(model: Parts, x: torch.Tensor, _: At) -> torch.Tensor:
    return model(x, aux=False) * torch.nan


USES: dict[str, Callable[[Parts, torch.Tensor, At], torch.Tensor]] = {
    "whole": use_whole,
    "parts": use_parts,
    "never": use_aux_if(lambda at: False),
    "rank 0": use_aux_if(lambda at: at.rank == 0),
    "not in update 2": use_aux_if(lambda at: at.update != 2),
    "not in the last micro-batch": use_aux_if(lambda at: not at.last_micro),
    "once": use_aux_if(lambda at: at.update == 1 and not at.last_micro),
    "frozen later": freeze_aux_later,
    "reentrant": use_twice_reentrant,
    "fewer blocks": fewer_blocks_on_rank_1,
    "padding without aux": use_aux_if(lambda at: False),
    "aux in padding": use_aux_if(lambda at: at.rank == 1),
    "aux only in padding": use_aux_if(lambda at: at.rank == 1 and at.update != 1),
    "no target": leave_out_target,
}


def is_padding(use: str, at: At) -> bool:
    """Rank 1 has no samples, except in the second update."""
    return use in ("padding without aux", "aux in padding", "aux only in padding") and at.rank == 1 and at.update != 1


def make_config(name: str) -> RunConfig:
    """`<strategy> <options>`, e.g. `ddp find_unused_parameters`, `deepspeed 3` or `fsdp`."""
    strategy, *options = name.split()
    settings: dict[str, Any] = {option: True for option in options if not option.isdecimal()}
    if stages := [int(option) for option in options if option.isdecimal()]:
        settings["stage"] = stages[0]
    decay = 0.0 if settings.pop("undecayed", False) else 0.1
    config = replace(RunConfig(), optimizer={"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": decay})
    if strategy == "exact":
        return replace(config, elastic=ElasticConfig(exact=True, shards=2))
    return replace(config, strategy=StrategyConfig(name=strategy, **settings))  # type: ignore[arg-type]


def make_replica(config: RunConfig, world: int) -> Replica:
    torch.manual_seed(0)
    model = Parts()
    precision = Precision.from_name("fp32", torch.device("cpu"))
    clock = StageClock(HostTimer())
    return build_replica(ReplicaArgs(model, config, world, precision, clock, blocks=find_blocks(model)))


def draw(at: At) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(at.update * 100 + at.rank * 10 + at.micro)
    return torch.randn(SIZE, 3, generator=generator), torch.randn(SIZE, 2, generator=generator)


def compute_loss(use: str, at: At, model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
    x, y = batch
    total = mse_loss(USES[use](model, x, at), y, reduction="sum")
    return Loss(total, 0 if use == "no target" else SIZE)


def train(replica: Replica, use: str, ranks: list[int]) -> Iterator[int]:
    """Train on the micro-batches of these ranks; yield each update that was completed."""
    for update in range(UPDATES):
        places = [At(update, rank, micro) for rank in ranks for micro in range(MICRO_BATCHES)]
        if len(ranks) > 1:  # one worker has no padding
            places = [at for at in places if not is_padding(use, at)]
        for at in places:
            with replica.micro_batch(last=at == places[-1], is_padding=is_padding(use, at), shard=at.rank):
                loss = replica.compute_loss(partial(compute_loss, use, at), draw(at))
                if at == places[-1]:
                    replica.send_stats(make_stats_row(update, ranks[0]))
                replica.backward(loss.total, SAMPLES)
        check_stats(replica.receive_stats(), update)
        replica.step(0.05, None, 1.0, None)
        yield update


def make_stats_row(update: int, rank: int) -> torch.Tensor:
    """Statistics as an update might have: large counts, small times, a loss that is NaN or infinite."""
    values = [2.0**40 + 3 * rank + update, 1 / 3, math.nan, math.inf, -math.inf, 1e-20, 12345.678 * (rank + 1), 0.0]
    return torch.tensor((values * NUM_STATS)[:NUM_STATS], dtype=torch.float64)


def check_stats(table: torch.Tensor, update: int) -> None:
    """Every rank has the rows of all ranks: whole numbers exactly, others to more digits than are printed."""
    expected = torch.stack([make_stats_row(update, rank) for rank in range(len(table))])
    table = table.sum(dim=1)
    torch.testing.assert_close(table, expected, rtol=1e-13, atol=0.0, equal_nan=True)
    assert torch.equal(table[:, 0], expected[:, 0])


@dataclass
class Outcome:
    """`steps`: updates that were completed. `error`: of this rank. `difference`: from training on one rank."""

    steps: int = 0
    error: str = ""
    kind: str = ""
    difference: float = 0.0
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)


def run_case(case: str, store: dist.Store, rank: int) -> Outcome:
    strategy, use = case.split(": ")
    outcome, start = Outcome(), time.monotonic()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=4))
    try:
        replica = make_replica(make_config(strategy), WORLD)
        for _ in train(replica, use, [rank]):
            outcome.steps += 1
        state = {name: tensor.detach().clone() for name, tensor in replica.full_state().model.items()}
        outcome.names = list(state)
    except Exception as error:
        outcome.error, outcome.kind = str(error), type(error).__name__
    finally:
        outcome.seconds = time.monotonic() - start
        dist.destroy_process_group()
    if not outcome.error and rank == 0:
        plain = make_replica(make_config("ddp undecayed" if "undecayed" in strategy else "ddp"), 1)
        for _ in train(plain, use, list(range(WORLD))):
            pass
        expected = plain.full_state().model
        outcome.difference = max(float((state[name] - expected[name]).abs().max()) for name in expected)
    return outcome


def forget_deepspeed_groups() -> None:
    """Let DeepSpeed start anew on the next case's process group."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        for name, value in vars(groups).items():
            if isinstance(value, dist.ProcessGroup):
                setattr(groups, name, None)


def main(folder: Path, rank: int, cases: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(WORLD), DS_ACCELERATOR="cpu")
    store = dist.FileStore(str(folder / "store"), WORLD)
    outcomes = {}
    for number, case in enumerate(cases):
        print(case, flush=True)
        outcomes[case] = vars(run_case(case, dist.PrefixStore(f"case {number}", store), rank))
        store.set(f"done {number} {rank}", "1")
        store.wait([f"done {number} {other}" for other in range(WORLD)])
        torch.use_deterministic_algorithms(False)
        forget_deepspeed_groups()
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
