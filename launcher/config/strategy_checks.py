"""Configurations that FSDP does not support, checked before anything starts and without importing torch."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.schema import RunConfig

__all__ = ["iter_fsdp_problems"]


def iter_fsdp_problems(config: RunConfig) -> Iterator[str]:
    """One line for each setting that FSDP does not support, with its fix."""
    if config.elastic.exact:
        yield "strategy=fsdp does not work with elastic.exact=true: type strategy=ddp"
    if config.strategy.param_dtype == "bf16" and config.train.precision != "bf16":
        yield (
            f"strategy.param_dtype=bf16 computes in bf16, which contradicts train.precision={config.train.precision}: type "
            "train.precision=bf16, or strategy.param_dtype=fp32"
        )
    if config.strategy.offload and config.train.device == "cpu":
        yield "strategy.offload=true with train.device=cpu has no effect: type strategy.offload=false"
