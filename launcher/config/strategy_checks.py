"""Configurations that a strategy does not support, checked before anything starts and without importing torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from launcher.config.schema import RunConfig
from launcher.errors import UsageError

__all__ = [
    "ALLOWED_KEYS",
    "ALLOWED_ZERO_KEYS",
    "KEYS_SET_HERE",
    "UNSET_VALUES",
    "UNSHARDABLE_OPTIMIZERS",
    "config_errors",
    "describe_missing_deepspeed",
    "iter_deepspeed_errors",
    "iter_fsdp_errors",
    "missing_dependency",
    "needs_equal_micro_batches",
]


def iter_fsdp_errors(config: RunConfig) -> Iterator[str]:
    """One line for each setting that FSDP does not support, with its fix."""
    if config.elastic.exact:
        yield "strategy=fsdp does not work with elastic.exact=true: type strategy=ddp"
    if config.strategy.param_dtype == "bf16" and config.train.precision != "bf16":
        yield (
            f"strategy.param_dtype=bf16 computes in bf16, which contradicts train.precision={config.train.precision}: "
            "type train.precision=bf16, or strategy.param_dtype=fp32"
        )
    if config.strategy.offload and config.train.device == "cpu":
        yield "strategy.offload=true with train.device=cpu has no effect: type strategy.offload=false"


#: Keys of a DeepSpeed JSON that this program controls, and our key that sets each.
KEYS_SET_HERE: Mapping[str, str] = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.per_device",
    "gradient_accumulation_steps": "batch.accumulation",
    "managed_gradient_accumulation": "batch.accumulation",
    "gradient_allreduce_op": "batch.policy",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "elasticity": "elastic.min_workers",
    "autotuning": "batch.per_device",
    "checkpoint": "checkpoint.every",
    "tensorboard": "sink",
    "wandb": "sink",
    "csv_monitor": "sink",
    "comet": "sink",
    "zero_optimization.stage": "strategy.stage",
    "zero_optimization.offload_optimizer": "strategy.offload",
    "zero_optimization.cpu_offload": "strategy.offload",
}


#: Keys a user's JSON may set: they change how the work is done, never the result.
ALLOWED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "communication_data_type",
        "comms_logger",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
    }
)


ALLOWED_ZERO_KEYS = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "log_trace_cache_warnings",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage3_allgather_sequential",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    }
)


#: Values that count as unset: Hugging Face's integration writes "auto" for values that it fills in.
UNSET_VALUES = ("auto", None)


#: torch's optimizers that do not work element by element, or that DeepSpeed replaces with its own.
UNSHARDABLE_OPTIMIZERS = ("Adafactor", "Adagrad", "LBFGS", "Muon", "SparseAdam")


def iter_deepspeed_errors(config: RunConfig) -> Iterator[str]:
    """What DeepSpeed does not support in this configuration, one line each, with the fix.

    Raises:
        UsageError: `strategy.config` cannot be read.
    """
    stage = config.strategy.stage
    if not 0 <= stage <= 3:
        yield f"strategy.stage={stage} is not a ZeRO stage: type strategy.stage=0, 1, 2 or 3"
    if config.train.precision == "fp64":
        yield (
            "train.precision=fp64 does not work with strategy=deepspeed, whose master parameters are fp32: type "
            "train.precision=fp32 or strategy=ddp"
        )
    if config.elastic.exact:
        yield "strategy=deepspeed does not work with elastic.exact=true: type strategy=ddp"
    if config.strategy.offload and stage == 0:
        yield "strategy.offload=true needs a sharded optimizer state: type strategy.stage=1, 2 or 3"
    name = str(config.optimizer.get("_target_")).rpartition(".")[2]
    if stage and str(config.optimizer.get("_target_")).startswith("torch.optim.") and name in UNSHARDABLE_OPTIMIZERS:
        yield (
            f"optimizer={name} cannot work on flat shards of parameters, which strategy.stage={stage} uses: type "
            "strategy.stage=0, strategy=ddp or optimizer=adamw"
        )
    if config.strategy.config is not None:
        yield from iter_deepspeed_json_conflicts(config, read_deepspeed_json(config.strategy.config))


def describe_missing_deepspeed() -> str | None:
    """An error message if DeepSpeed is not installed; checks without importing it."""
    if find_spec("deepspeed") is not None:
        return None
    return "strategy=deepspeed: DeepSpeed is not installed: type pip install 'elastic-batch-launcher[deepspeed]'"


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The user's JSON without the entries that count as unset.

    Raises:
        UsageError: it cannot be read, or is not a JSON object.
    """
    fix = "name a DeepSpeed JSON file, or leave strategy.config out"
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (OSError, ValueError) as problem:
        raise UsageError(f"strategy.config={path} cannot be read: {problem}; {fix}") from problem
    if not isinstance(document, dict) or not isinstance(document.get("zero_optimization", {}), dict):
        raise UsageError(f"strategy.config={path} is not a DeepSpeed configuration: {fix}")
    zero = {name: value for name, value in document.pop("zero_optimization", {}).items() if not _is_unset(value)}
    return {**{name: value for name, value in document.items() if not _is_unset(value)}, "zero_optimization": zero}


def _is_unset(value: Any) -> bool:
    return value in UNSET_VALUES or (isinstance(value, dict) and value.get("enabled") is False)


def iter_deepspeed_json_conflicts(config: RunConfig, own: Mapping[str, Any]) -> Iterator[str]:
    path = config.strategy.config
    zero = own.get("zero_optimization", {})
    if zero.get("stage") == config.strategy.stage:
        zero = {name: value for name, value in zero.items() if name != "stage"}
    for name in (*(own.keys() - {"zero_optimization"}), *(f"zero_optimization.{name}" for name in zero)):
        if name in KEYS_SET_HERE:
            ours = KEYS_SET_HERE[name]
            yield (
                f"strategy.config={path} sets {name}, which is set by {ours} here: "
                f"take it out of the file and type {ours}="
            )
        elif name not in ALLOWED_KEYS and name.removeprefix("zero_optimization.") not in ALLOWED_ZERO_KEYS:
            yield f"strategy.config={path} sets {name}, which is not supported: take it out of the file"


def needs_equal_micro_batches(config: RunConfig) -> bool:
    """Whether every rank must run the same number of micro-batches, because each of them communicates."""
    return config.strategy.name == "fsdp" or (config.strategy.name == "deepspeed" and config.strategy.stage >= 2)


def config_errors(config: RunConfig) -> Iterator[str]:
    """What the configured strategy does not support, one line each, with the fix. Does not import torch."""
    if config.strategy.static_graph and config.strategy.find_unused_parameters:
        yield (
            "strategy.static_graph=true and strategy.find_unused_parameters=true contradict each other: the one says "
            "that all updates use the same parameters, the other that they do not: set one of them to false"
        )
    if config.strategy.name == "fsdp":
        yield from iter_fsdp_errors(config)
    if config.strategy.name == "deepspeed":
        yield from iter_deepspeed_errors(config)


def missing_dependency(config: RunConfig) -> str | None:
    """What the configured strategy needs and this machine lacks, with the fix; None if nothing. No torch import."""
    if config.strategy.name == "deepspeed":
        return describe_missing_deepspeed()
    return None
