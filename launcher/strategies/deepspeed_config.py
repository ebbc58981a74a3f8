"""DeepSpeed's configuration: our part, and what a user's JSON may add. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

from typing import Any

from launcher.config.schema import RunConfig
from launcher.config.strategy_checks import (
    ALLOWED_KEYS,
    ALLOWED_ZERO_KEYS,
    iter_deepspeed_json_conflicts,
    read_deepspeed_json,
)
from launcher.errors import UsageError

__all__ = ["make_deepspeed_config"]


BUCKET_NUMEL = 500_000_000  # DeepSpeed's default, in elements; it allocates a buffer of this length for any model


def make_deepspeed_config(config: RunConfig, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model with `numel` trainable elements.

    It always says one micro-batch of one sample: we divide the loss and set the accumulation boundary ourselves, so
    none of DeepSpeed's batch assertions can contradict the plan at any world size.

    Raises:
        UsageError: `strategy.config` cannot be read, or sets a key that this program controls.
    """
    user_json = {} if config.strategy.config is None else read_deepspeed_json(config.strategy.config)
    for problem in iter_deepspeed_json_conflicts(config, user_json):
        raise UsageError(problem)
    zero = {name: value for name, value in user_json.pop("zero_optimization", {}).items() if name in ALLOWED_ZERO_KEYS}
    offload = {"offload_optimizer": {"device": "cpu"}} if config.strategy.offload else {}
    return {
        "steps_per_print": None,
        **{name: value for name, value in user_json.items() if name in ALLOWED_KEYS},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # our step clips; without this entry stage 0 would clip at 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "reduce_bucket_size": max(1, min(numel, BUCKET_NUMEL)),
            **zero,
            **offload,
            "stage": config.strategy.stage,
        },
    }
