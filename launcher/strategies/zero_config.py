"""DeepSpeed's configuration: our part, and what a user's JSON may add. Imports neither torch nor DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from launcher.errors import RequestError
from launcher.settings import Run

__all__ = ["configuration", "missing", "problems"]

#: Keys of a DeepSpeed JSON that this program controls, and our key that sets each.
OWNED: Mapping[str, str] = {
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
FREE = frozenset(
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
FREE_ZERO = frozenset(
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
SILENT = ("auto", None)

#: torch's optimizers that do not work element by element, or that DeepSpeed replaces with its own.
NOT_IN_PIECES = ("Adafactor", "Adagrad", "LBFGS", "Muon", "SparseAdam")
BUCKET = 500_000_000  # DeepSpeed's default, in elements; it allocates a buffer of this length for any model


def problems(run: Run) -> Iterator[str]:
    """What DeepSpeed does not support in this configuration, one line each, with the fix.

    Raises:
        UsageError: `strategy.config` cannot be read.
    """
    stage = run.strategy.stage
    if not 0 <= stage <= 3:
        yield f"strategy.stage={stage} is not a ZeRO stage: type strategy.stage=0, 1, 2 or 3"
    if run.train.precision == "fp64":
        yield (
            "train.precision=fp64 does not work with strategy=deepspeed, whose master parameters are fp32: type "
            "train.precision=fp32 or strategy=ddp"
        )
    if run.elastic.exact:
        yield "strategy=deepspeed does not work with elastic.exact=true: type strategy=ddp"
    if run.strategy.offload and stage == 0:
        yield "strategy.offload=true needs a sharded optimizer state: type strategy.stage=1, 2 or 3"
    name = str(run.optimizer.get("_target_")).rpartition(".")[2]
    if stage and str(run.optimizer.get("_target_")).startswith("torch.optim.") and name in NOT_IN_PIECES:
        yield (
            f"optimizer={name} cannot work on flat shards of parameters, which strategy.stage={stage} uses: type "
            "strategy.stage=0, strategy=ddp or optimizer=adamw"
        )
    if run.strategy.config is not None:
        yield from _clashes(run, _read(run.strategy.config))


def missing() -> str | None:
    """An error message if DeepSpeed is not installed; checks without importing it."""
    if find_spec("deepspeed") is not None:
        return None
    return "strategy=deepspeed: DeepSpeed is not installed: type pip install 'elastic-batch-launcher[deepspeed]'"


def configuration(run: Run, numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a model with `numel` trainable elements.

    It always says one micro-batch of one sample: we divide the loss and set the accumulation boundary ourselves, so
    none of DeepSpeed's batch assertions can contradict the plan at any world size.

    Raises:
        UsageError: `strategy.config` cannot be read, or sets a key that this program controls.
    """
    own = {} if run.strategy.config is None else _read(run.strategy.config)
    for problem in _clashes(run, own):
        raise RequestError(problem)
    zero = {name: value for name, value in own.pop("zero_optimization", {}).items() if name in FREE_ZERO}
    offload = {"offload_optimizer": {"device": "cpu"}} if run.strategy.offload else {}
    return {
        "steps_per_print": None,
        **{name: value for name, value in own.items() if name in FREE},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # our step clips; without this entry stage 0 would clip at 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "reduce_bucket_size": max(1, min(numel, BUCKET)),
            **zero,
            **offload,
            "stage": run.strategy.stage,
        },
    }


def _read(path: str) -> dict[str, Any]:
    """The user's JSON without the entries that count as unset.

    Raises:
        UsageError: it cannot be read, or is not a JSON object.
    """
    mend = "name a DeepSpeed JSON file, or leave strategy.config out"
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as problem:
        raise RequestError(f"strategy.config={path} cannot be read: {problem}; {mend}") from problem
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization", {}), dict):
        raise RequestError(f"strategy.config={path} is not a DeepSpeed configuration: {mend}")
    zero = {name: value for name, value in found.pop("zero_optimization", {}).items() if not _silent(value)}
    return {**{name: value for name, value in found.items() if not _silent(value)}, "zero_optimization": zero}


def _silent(value: Any) -> bool:
    return value in SILENT or (isinstance(value, dict) and value.get("enabled") is False)


def _clashes(run: Run, own: Mapping[str, Any]) -> Iterator[str]:
    path = run.strategy.config
    zero = own.get("zero_optimization", {})
    if zero.get("stage") == run.strategy.stage:
        zero = {name: value for name, value in zero.items() if name != "stage"}
    for name in (*(own.keys() - {"zero_optimization"}), *(f"zero_optimization.{name}" for name in zero)):
        if name in OWNED:
            ours = OWNED[name]
            yield (
                f"strategy.config={path} sets {name}, which is set by {ours} here: "
                f"take it out of the file and type {ours}="
            )
        elif name not in FREE and name.removeprefix("zero_optimization.") not in FREE_ZERO:
            yield f"strategy.config={path} sets {name}, which is not supported: take it out of the file"
