"""Every key of the configuration: its type, its default and its one line of documentation.

These frozen values are what the rest of the program works with. They hold no behaviour and know nothing of
Hydra: `launcher.config` fills them, checks them and writes them to `run.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "ALIASES",
    "BatchSettings",
    "CheckpointSettings",
    "DataSettings",
    "ElasticSettings",
    "LaunchSettings",
    "LogSettings",
    "LrSettings",
    "ModelSettings",
    "PlanSettings",
    "Run",
    "RunSettings",
    "ScheduleSettings",
    "StrategySettings",
    "SweepSettings",
    "TargetSettings",
    "TrainSettings",
    "TuneSettings",
]

#: The keys whose name in the configuration cannot be an attribute's name in Python.
ALIASES: Mapping[str, str] = {"global": "global_batch"}


def key(default: Any, doc: str) -> Any:
    """A field with its one line of documentation, shown by `launcher --help`."""
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def part(kind: type) -> Any:
    return field(default_factory=kind)


@dataclass(frozen=True)
class BatchSettings:
    policy: Literal["scale", "hold", "bounded", "goodput"] = key(
        "scale",
        "scale: global = workers x per_device x accumulation; hold: global stays; bounded: clamped; goodput: the most "
        "progress per second",
    )
    per_device: int | Literal["auto"] = key(
        32,
        "samples per worker per micro-batch; under hold and bounded a cap; auto: measured, as tune does",
    )
    accumulation: int | Literal["auto"] = key(
        "auto", "micro-batches per update; auto is 1 under scale, fewest under hold"
    )
    global_batch: int | Literal["full"] | None = key(
        None, "samples per update under hold; full is the whole training set"
    )
    min_global: int | None = key(None, "lower bound of the global batch under bounded and goodput")
    max_global: int | None = key(None, "upper bound of the global batch under bounded and goodput")
    ramp: tuple[tuple[str, float], ...] | None = key(
        None, "share of the global batch from each time on, e.g. [[0dur,0.25],[0.1dur,0.5],[0.2dur,1]]"
    )


@dataclass(frozen=True)
class LrSettings:
    base: float | None = key(None, "the learning rate chosen for lr.base_batch")
    base_batch: int | None = key(None, "the global batch that lr.base was chosen for")
    rule: Literal["auto", "linear", "sqrt", "noise", "none"] = key(
        "auto",
        "how the rate follows the batch; auto: linear for SGD, sqrt for the Adam family, none for Rprop; noise: by the "
        "measured noise of the gradient",
    )


@dataclass(frozen=True)
class ScheduleSettings:
    decay: Literal["constant", "linear", "cosine", "step", "exponential", "plateau", "onecycle"] = key(
        "constant", "the shape of the rate after warmup"
    )
    warmup: str = key("0ep", "how long the rate rises, a duration")
    warmup_shape: Literal["linear", "cosine"] = key("linear", "the shape of the rise")
    warmup_from: Literal["zero", "base"] | float = key(
        "zero", "where the rise starts: zero, base (lr.base) or a share of the target rate"
    )
    per: Literal["update", "epoch"] = key("update", "how often the rate moves")
    end: float = key(0.0, "the last rate as a share of the peak: linear, cosine, onecycle")
    start: float = key(0.04, "onecycle's first rate as a share of the peak")
    momentum: tuple[float, float] | None = key(None, "onecycle's momentum [low, high]; untouched unless set")
    milestones: tuple[str, ...] = key((), "step: the times at which the rate is multiplied by factor, durations")
    every: str | None = key(None, "step and exponential: multiply by factor each time this duration has passed")
    factor: float = key(0.1, "step, exponential, plateau: what the rate is multiplied by")
    metric: str = key("val/loss", "plateau: the metric that is watched")
    mode: Literal["min", "max"] = key("min", "plateau: whether the metric should fall or rise")
    patience: int = key(3, "plateau: validations without improvement before the rate falls")
    min: float = key(0.0, "plateau and exponential: the lowest share of the rate")


@dataclass(frozen=True)
class TargetSettings:
    metric: str | None = key(None, "the metric whose time to target is recorded, e.g. val/accuracy")
    at_least: float | None = key(None, "the target is reached at this value or above")
    at_most: float | None = key(None, "the target is reached at this value or below")


@dataclass(frozen=True)
class TrainSettings:
    duration: str = key("10ep", "how long to train: 10ep, 500ba, 50000sp, 1e9tok")
    target: TargetSettings = part(TargetSettings)
    stop_at_target: bool = key(False, "end at the first validation that reaches the target")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = key("fp32", "the numbers of the forward and backward pass")
    compile: bool = key(False, "torch.compile the model")
    activation_checkpointing: bool = key(False, "compute a block's activations anew in the backward pass")
    clip_norm: float | None = key(None, "clip the gradient's norm to this")
    validate_every: str | None = key("1ep", "how often to validate, a duration; null for only at the end")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to train")
    decay_norms: bool = key(False, "apply weight decay to norms and biases as well")
    profile: str | None = key(None, "torch.profiler over these updates, e.g. 10-13, into the run folder")


@dataclass(frozen=True)
class DataSettings:
    workers: int = key(0, "loader processes per rank")
    prefetch: int = key(2, "micro-batches each loader process prepares ahead")
    source: Literal["real", "synthetic"] = key("real", "synthetic: the same shapes, nothing read")
    tail: Literal["flush", "carry"] = key(
        "flush", "a partial window at an epoch's end: its own update, or carried over"
    )


@dataclass(frozen=True)
class StrategySettings:
    name: Literal["ddp", "fsdp", "deepspeed"] = key("ddp", "how the model lies on the workers")
    find_unused_parameters: bool = key(False, "DDP: look for parameters that got no gradient")
    reshard: bool = key(True, "FSDP: let go of a block's parameters between its forward and its backward pass")
    gather: Literal["fp32", "bf16"] = key("fp32", "FSDP: the numbers that parameters are gathered in")
    meta: bool | Literal["auto"] = key(
        "auto", "FSDP: rank 0 alone builds the model and hands it out; auto above 4 GiB of parameters, where that works"
    )
    stage: int = key(2, "DeepSpeed: 1 divides the optimizer's state, 2 gradients too, 3 parameters too; 0 nothing")
    offload: bool = key(False, "keep what the optimizer works on in the machine's memory; for GPUs")
    config: str | None = key(None, "a DeepSpeed JSON of your own: how the work is done, nothing that has a key here")


@dataclass(frozen=True)
class ElasticSettings:
    min_workers: int = key(1, "fewer workers than this are refused")
    max_workers: int | None = key(None, "more workers than this are refused")
    max_restarts: int = key(3, "restarts without a new checkpoint before the job gives up")
    hang_s: float = key(8.0, "a worker without progress for so many seconds, the others waiting, has hung")
    first_s: float = key(600.0, "the same for what happens for the first time: start, first update, validation, save")
    idle: bool = key(False, "whether a plan may leave a worker without samples")
    balance: bool = key(False, "shares follow the measured speeds of the workers; the global batch stays")
    exact: bool = key(False, "bitwise the same parameters at any number of workers; hold, DDP; slower")
    shards: int = key(8, "exact: parts of a batch, a power of two; as many workers can train")


@dataclass(frozen=True)
class LaunchSettings:
    kind: Literal["local", "slurm"] = key("local", "where the job is started")
    workers: int | None = key(None, "processes per node; one per GPU by default, else 1")
    nodes: str = key("1", "slurm: nodes, 2 or 2-4; a range lets the job go on without a node that is lost")
    time: str | None = key(None, "slurm: how long the job may run before it is queued again: 4h, 30min, 1-12:00:00")
    partition: str | None = key(None, "slurm: the partition; the cluster's default otherwise")
    account: str | None = key(None, "slurm: the account to charge")
    qos: str | None = key(None, "slurm: the quality of service")
    constraint: str | None = key(None, "slurm: features that the nodes must have")
    extra: tuple[str, ...] = key((), "slurm: more options of sbatch, e.g. [--gpus-per-node=4,--mem=0]")
    dry: bool = key(False, "print the command, or the sbatch text, instead of starting it")
    backend: Literal["auto", "gloo", "nccl"] = key("auto", "collectives: nccl on GPUs, gloo elsewhere")
    timeout_s: float = key(600.0, "a collective that takes longer has failed")
    threads: int | None = key(None, "CPU threads per rank; OMP_NUM_THREADS that launcher finds, else cores / workers")
    env: Mapping[str, str] = key({}, "environment variables to pass to the workers")


@dataclass(frozen=True)
class CheckpointSettings:
    every: str | None = key("1ep", "how often to save: a duration or 10min; null for only at the end")
    keep: int = key(2, "how many checkpoints to keep")
    dir: str | None = key(None, "where; <run folder>/checkpoints by default")
    sharded: bool | Literal["auto"] = key(
        "auto", "each rank writes its own part; auto where the strategy shards more than 4 GiB of parameters"
    )
    best: str | None = key(None, "keep the best checkpoint by this metric, e.g. val/accuracy")
    best_mode: Literal["auto", "min", "max"] = key("auto", "whether the best is lowest or highest; auto: losses lowest")


@dataclass(frozen=True)
class ModelSettings:
    init: str | None = key(None, "parameters to start from, a safetensors file")
    strict: bool = key(True, "model.init must hold exactly the model's names; false says the differences and goes on")


@dataclass(frozen=True)
class LogSettings:
    every: int = key(1, "updates between training rows in metrics.jsonl")


@dataclass(frozen=True)
class PlanSettings:
    worlds: tuple[int, ...] | None = key(None, "launcher plan: the world sizes to show; 1 to 64 by default")
    noise: float | str | None = key(
        None,
        "launcher plan batch=goodput, tune: the noise scale in samples, or a run that measured it; what training "
        "with batch=goodput begins by",
    )
    memory: bool = key(False, "also what the model's state takes per worker under each strategy; imports torch")


@dataclass(frozen=True)
class TuneSettings:
    sizes: tuple[int, ...] | None = key(None, "launcher tune: measure exactly these sizes, e.g. [20,45]")
    max: int | None = key(None, "launcher tune: the largest size to try; the data set's by default")
    budget_s: float | None = key(None, "seconds to spend on measuring: 120, before training with per_device=auto 30")
    out: str | None = key(None, "launcher tune: a folder to write tune.json and tune.html into")


@dataclass(frozen=True)
class SweepSettings:
    at_once: int = key(1, "-m: points that train at the same time; this machine is divided among them")
    trials: int | None = key(None, "-m: so many points, chosen by Optuna from what the earlier ones came to")
    metric: str | None = key(
        None, "trials: what to search for, e.g. val/accuracy, seconds, target/seconds; train.target.metric by default"
    )
    mode: Literal["auto", "min", "max"] = key("auto", "trials: whether the least or the most is best; auto: by metric")


@dataclass(frozen=True)
class RunSettings:
    name: str | None = key(None, "the run's name; <recipe>-<job or time> by default")
    dir: str | None = key(None, "the run's folder; runs/<name> by default")


@dataclass(frozen=True)
class Run:
    """One resolved configuration. World size is not in it: that comes from the job's environment.

    `recipe`, `optimizer` and `sink` are mappings: their keys belong to the recipe, to torch and to the sinks.
    """

    recipe: Mapping[str, Any] = key({}, "the recipe: _target_, trust and its own fields")
    batch: BatchSettings = part(BatchSettings)
    lr: LrSettings = part(LrSettings)
    optimizer: Mapping[str, Any] = key({}, "_target_ and torch's own argument names")
    schedule: ScheduleSettings = part(ScheduleSettings)
    train: TrainSettings = part(TrainSettings)
    data: DataSettings = part(DataSettings)
    strategy: StrategySettings = part(StrategySettings)
    elastic: ElasticSettings = part(ElasticSettings)
    launch: LaunchSettings = part(LaunchSettings)
    sink: Mapping[str, Any] = key({}, "where the figures go: console, wandb, tensorboard")
    checkpoint: CheckpointSettings = part(CheckpointSettings)
    model: ModelSettings = part(ModelSettings)
    log: LogSettings = part(LogSettings)
    plan: PlanSettings = part(PlanSettings)
    tune: TuneSettings = part(TuneSettings)
    sweep: SweepSettings = part(SweepSettings)
    run: RunSettings = part(RunSettings)
    resume: str = key("auto", "auto, never, must or the folder of a checkpoint")
    seed: int = key(0, "everything random follows from it")
    debug: bool = key(False, "show tracebacks and the noise of libraries")
    format: Literal["text", "json"] = key("text", "json: one JSON document on stdout, for plan, tune and verify")
