"""What a run under FSDP cannot be, said before anything starts. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.settings import Run

__all__ = ["problems"]


def problems(run: Run) -> Iterator[str]:
    """What is wrong with a run under FSDP, each in one line with its mend."""
    if run.elastic.exact:
        yield "strategy=fsdp does not go with elastic.exact=true: type strategy=ddp"
    if run.strategy.gather == "bf16" and run.train.precision != "bf16":
        yield (
            f"strategy.gather=bf16 computes in bf16 and train.precision={run.train.precision} says otherwise: type "
            "train.precision=bf16, or strategy.gather=fp32"
        )
    if run.strategy.offload and run.train.device == "cpu":
        yield "strategy.offload=true with train.device=cpu: all is on the CPU already; type strategy.offload=false"
