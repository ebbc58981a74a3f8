"""Configurations that FSDP does not support, checked before anything starts and without importing torch."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.settings import Run

__all__ = ["problems"]


def problems(run: Run) -> Iterator[str]:
    """One line for each setting that FSDP does not support, with its fix."""
    if run.elastic.exact:
        yield "strategy=fsdp does not work with elastic.exact=true: type strategy=ddp"
    if run.strategy.gather == "bf16" and run.train.precision != "bf16":
        yield (
            f"strategy.gather=bf16 computes in bf16, which contradicts train.precision={run.train.precision}: type "
            "train.precision=bf16, or strategy.gather=fp32"
        )
    if run.strategy.offload and run.train.device == "cpu":
        yield "strategy.offload=true with train.device=cpu has no effect: type strategy.offload=false"
