"""The configuration classes: every key with its type, default and one line of documentation.

They are frozen, contain no behaviour and do not depend on Hydra. `ConfigComposer` fills and validates them, and
`to_yaml` writes them to `run.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "ALIASES",
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "ElasticConfig",
    "LaunchConfig",
    "LogConfig",
    "LrConfig",
    "ModelConfig",
    "PlanConfig",
    "RunConfig",
    "RunDirConfig",
    "ScheduleConfig",
    "StrategyConfig",
    "SweepConfig",
    "TargetConfig",
    "TrainConfig",
    "TuneConfig",
]

#: Configuration key -> attribute, for names that are reserved words in Python.
ALIASES: Mapping[str, str] = {"global": "global_batch"}


def option(default: Any, doc: str) -> Any:
    """A dataclass field with its line of documentation, which `launcher --help` shows."""
    if isinstance(default, dict | list):
        return field(default_factory=default.copy, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


def section(kind: type) -> Any:
    return field(default_factory=kind)


@dataclass(frozen=True)
class BatchConfig:
    policy: Literal["scale", "hold", "bounded", "goodput"] = option(
        "scale",
        "scale: global = workers x per_device x accumulation; hold: global is fixed; bounded: as scale, clamped to "
        "[min_global, max_global]; goodput: maximises training progress per second",
    )
    per_device: int | Literal["auto"] = option(
        32,
        "samples per worker per micro-batch; an upper limit under hold and bounded; auto: measured as by launcher tune",
    )
    accumulation: int | Literal["auto"] = option(
        "auto", "micro-batches per update; auto: 1 under scale, the fewest that fit under hold and bounded"
    )
    global_batch: int | Literal["full", "divisible"] | None = option(
        None,
        "samples per update under hold; full: the whole training set; divisible, for launcher plan: the batch up to "
        "max_global that most world sizes divide",
    )
    min_global: int | None = option(None, "lower bound of the global batch under bounded and goodput")
    max_global: int | None = option(None, "upper bound of the global batch under bounded and goodput")
    ramp: tuple[tuple[str, float], ...] | None = option(
        None, "batch warmup: [start time, share of the global batch], e.g. [[0dur,0.25],[0.1dur,0.5],[0.2dur,1]]"
    )


@dataclass(frozen=True)
class LrConfig:
    base: float | None = option(None, "the learning rate at a global batch of lr.base_batch")
    base_batch: int | None = option(None, "the global batch that lr.base was chosen for")
    rule: Literal["auto", "linear", "sqrt", "noise", "none"] = option(
        "auto",
        "how the learning rate scales with the batch; auto: linear for SGD, sqrt for the Adam family, none for Rprop; "
        "noise: by the measured gradient noise scale",
    )


@dataclass(frozen=True)
class ScheduleConfig:
    decay: Literal["constant", "linear", "cosine", "step", "exponential", "plateau", "onecycle"] = option(
        "constant", "the learning rate schedule after warmup"
    )
    warmup: str = option("0ep", "the length of the warmup, a duration")
    warmup_shape: Literal["linear", "cosine"] = option("linear", "the shape of the warmup")
    warmup_from: Literal["zero", "base"] | float = option(
        "zero", "the learning rate at which warmup starts: zero, base (lr.base) or a share of the target learning rate"
    )
    per: Literal["update", "epoch"] = option("update", "how often the learning rate changes")
    end: float = option(0.0, "linear, cosine, onecycle: the final learning rate as a share of the peak")
    start: float = option(0.04, "onecycle: the initial learning rate as a share of the peak")
    momentum: tuple[float, float] | None = option(
        None, "onecycle: the momentum range [low, high]; momentum is unchanged unless set"
    )
    milestones: tuple[str, ...] = option(
        (), "step: the times (durations) at which the learning rate is multiplied by factor"
    )
    every: str | None = option(None, "step, exponential: multiply the learning rate by factor once per this duration")
    factor: float = option(0.1, "step, exponential, plateau: the factor by which the learning rate is multiplied")
    metric: str = option("val/loss", "plateau: the metric to watch")
    mode: Literal["min", "max"] = option("min", "plateau: whether the metric should fall or rise")
    patience: int = option(3, "plateau: validations without improvement before the learning rate is lowered")
    min: float = option(0.0, "plateau, exponential: the lower limit, as a share of the peak learning rate")


@dataclass(frozen=True)
class TargetConfig:
    metric: str | None = option(None, "the metric whose time to target is recorded, e.g. val/accuracy")
    at_least: float | None = option(None, "the target is reached at this value or above")
    at_most: float | None = option(None, "the target is reached at this value or below")


@dataclass(frozen=True)
class TrainConfig:
    duration: str = option("10ep", "how long to train: 10ep, 500ba, 50000sp, 1e9tok")
    target: TargetConfig = section(TargetConfig)
    stop_at_target: bool = option(False, "stop at the first validation that reaches the target")
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = option(
        "fp32", "the number format of the forward and backward pass"
    )
    compile: bool = option(False, "compile the model with torch.compile")
    activation_checkpointing: bool = option(False, "recompute each block's activations in the backward pass")
    clip_norm: float | None = option(None, "clip the gradient norm to this value")
    validate_every: str | None = option("1ep", "how often to validate, a duration; null for only at the end")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to train")
    decay_norms: bool = option(False, "apply weight decay to norms and biases as well")
    profile: str | None = option(
        None, "run torch.profiler over these updates, e.g. 10-13, and save the trace in the run directory"
    )


@dataclass(frozen=True)
class DataConfig:
    num_workers: int = option(0, "loader processes per rank")
    prefetch_factor: int = option(2, "micro-batches that each loader process prepares ahead")
    source: Literal["real", "synthetic"] = option(
        "real", "synthetic: generated data of the same shapes, nothing is read"
    )
    tail: Literal["flush", "carry"] = option(
        "flush", "incomplete batch at an epoch's end; flush: its own smaller update; carry: filled from the next epoch"
    )


@dataclass(frozen=True)
class StrategyConfig:
    name: Literal["ddp", "fsdp", "deepspeed"] = option("ddp", "how the model is distributed over the workers")
    find_unused_parameters: bool = option(
        False, "DDP and FSDP: loss() may leave out parameters in some updates, or on some workers"
    )
    static_graph: bool = option(
        False,
        "DDP: every update uses the same parameters equally often, so no micro-batch lacks targets; "
        "allows reentrant activation checkpoints",
    )
    reshard_after_forward: bool = option(
        True, "FSDP: free a block's gathered parameters between its forward and backward pass"
    )
    param_dtype: Literal["fp32", "bf16"] = option("fp32", "FSDP: the number format in which parameters are gathered")
    meta_init: bool | Literal["auto"] = option(
        "auto", "FSDP: only rank 0 builds the model and broadcasts it; auto: above 4 GiB of parameters, if supported"
    )
    stage: int = option(
        2, "DeepSpeed: ZeRO stage; 0 shards nothing, 1 optimizer state, 2 gradients too, 3 parameters too"
    )
    offload: bool = option(
        False, "GPU training with FSDP or DeepSpeed: keep the optimizer state in CPU memory; FSDP: the parameters too"
    )
    config: str | None = option(None, "your DeepSpeed JSON file; it must not set anything that has a key here")


@dataclass(frozen=True)
class ElasticConfig:
    min_workers: int = option(1, "smallest world size that the job accepts")
    max_workers: int | None = option(None, "largest world size that the job accepts")
    max_restarts: int = option(3, "restarts without a new checkpoint before the job gives up")
    hang_timeout_s: float = option(
        8.0, "seconds without progress, while the others wait, after which a worker counts as hung"
    )
    first_timeout_s: float = option(
        600.0, "the same for the first occurrence of a phase: start, first update, validation, save"
    )
    allow_idle: bool = option(False, "allow plans in which some workers get no samples")
    balance: bool = option(False, "size each worker's share by its measured speed; the global batch does not change")
    exact: bool = option(False, "bitwise identical parameters at any world size; needs batch=hold and DDP; slower")
    shards: int = option(8, "exact: virtual shards per batch, a power of two; the largest number of workers that train")


@dataclass(frozen=True)
class LaunchConfig:
    kind: Literal["local", "slurm"] = option("local", "how the job is started: on this machine or through Slurm")
    workers: int | None = option(None, "processes per node; default: one per GPU, or 1 without GPUs")
    nodes: str = option("1", "slurm: number of nodes, 2 or 2-4; with a range the job continues if a node is lost")
    time: str | None = option(None, "slurm: time limit after which the job is requeued, e.g. 4h, 30min, 1-12:00:00")
    partition: str | None = option(None, "slurm: the partition; default: the cluster's")
    account: str | None = option(None, "slurm: the account to charge")
    qos: str | None = option(None, "slurm: the quality of service")
    constraint: str | None = option(None, "slurm: node features that are required")
    extra: tuple[str, ...] = option((), "slurm: further sbatch options, e.g. [--gpus-per-node=4,--mem=0]")
    dry_run: bool = option(False, "print the command or the sbatch script instead of starting it")
    backend: Literal["auto", "gloo", "nccl"] = option(
        "auto", "backend of the collectives; auto: nccl on GPUs, otherwise gloo"
    )
    timeout_s: float = option(600.0, "time limit in seconds of a collective; a slower one counts as failed")
    grace_s: float = option(30.0, "seconds from SIGTERM to the end of the job, saved if that is possible by then")
    threads: int | None = option(
        None, "CPU threads per rank; default: OMP_NUM_THREADS if it is set, otherwise cores / workers"
    )
    env: Mapping[str, str] = option({}, "environment variables to set for the workers")


@dataclass(frozen=True)
class CheckpointConfig:
    every: str | None = option("1ep", "how often to save: a duration, or minutes as in 10min; null for only at the end")
    keep: int = option(2, "how many checkpoints to keep")
    dir: str | None = option(None, "the directory of the checkpoints; default: checkpoints/ in the run directory")
    sharded: bool | Literal["auto"] = option(
        "auto", "each rank writes its own part; auto: if the strategy shards more than 4 GiB of parameters"
    )
    best: str | None = option(None, "also keep the best checkpoint by this metric, e.g. val/accuracy")
    best_mode: Literal["auto", "min", "max"] = option(
        "auto", "whether the lowest or highest value is best; auto: lowest for losses"
    )


@dataclass(frozen=True)
class ModelConfig:
    init: str | None = option(None, "safetensors file with initial parameters")
    strict: bool = option(
        True, "model.init must contain exactly the model's names; false: log the differences and continue"
    )


@dataclass(frozen=True)
class LogConfig:
    every: int = option(1, "number of updates between training rows in metrics.jsonl")


@dataclass(frozen=True)
class PlanConfig:
    world_sizes: tuple[int, ...] | None = option(None, "launcher plan: the world sizes to show; default: 1 to 64")
    noise: float | str | None = option(
        None,
        "launcher plan batch=goodput, tune: the noise scale in samples, or a run that measured it; the initial noise "
        "scale of training with batch=goodput",
    )
    memory: bool = option(
        False, "launcher plan: also show the memory per worker of the model's state under each strategy; imports torch"
    )


@dataclass(frozen=True)
class TuneConfig:
    sizes: tuple[int, ...] | None = option(
        None, "launcher tune: measure exactly these batch sizes per worker, e.g. [20,45]"
    )
    max: int | None = option(None, "launcher tune: the largest size to try; default: the size of the data set")
    budget_s: float | None = option(
        None, "seconds to spend on measuring; default: 120, or 30 before training with per_device=auto"
    )
    out: str | None = option(None, "launcher tune: the folder for tune.json and tune.html")


@dataclass(frozen=True)
class SweepConfig:
    max_parallel: int = option(
        1, "-m: number of points that train in parallel; the machine's resources are divided among them"
    )
    trials: int | None = option(None, "-m: number of points that Optuna chooses, based on the results of earlier ones")
    metric: str | None = option(
        None, "trials: the objective, e.g. val/accuracy, seconds, target/seconds; default: train.target.metric"
    )
    mode: Literal["auto", "min", "max"] = option(
        "auto", "trials: minimise or maximise the metric; auto: depends on the metric"
    )


@dataclass(frozen=True)
class RunDirConfig:
    name: str | None = option(None, "the run's name; default: <recipe>-<job or time>")
    dir: str | None = option(None, "the run directory; default: runs/<name>")


@dataclass(frozen=True)
class RunConfig:
    """One resolved configuration. It does not contain the world size, which comes from the job's environment.

    `recipe`, `optimizer` and `sink` are mappings whose keys are defined by the recipe, torch and the sinks.
    """

    recipe: Mapping[str, Any] = option({}, "the recipe: _target_, trust and its own fields")
    batch: BatchConfig = section(BatchConfig)
    lr: LrConfig = section(LrConfig)
    optimizer: Mapping[str, Any] = option({}, "the optimizer: _target_ and torch's own argument names")
    schedule: ScheduleConfig = section(ScheduleConfig)
    train: TrainConfig = section(TrainConfig)
    data: DataConfig = section(DataConfig)
    strategy: StrategyConfig = section(StrategyConfig)
    elastic: ElasticConfig = section(ElasticConfig)
    launch: LaunchConfig = section(LaunchConfig)
    sink: Mapping[str, Any] = option({}, "where metrics are sent: console, wandb, tensorboard")
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    model: ModelConfig = section(ModelConfig)
    log: LogConfig = section(LogConfig)
    plan: PlanConfig = section(PlanConfig)
    tune: TuneConfig = section(TuneConfig)
    sweep: SweepConfig = section(SweepConfig)
    run: RunDirConfig = section(RunDirConfig)
    resume: str = option("auto", "auto, never, must or a checkpoint folder")
    seed: int = option(0, "the seed of all randomness")
    debug: bool = option(False, "show tracebacks and the log output of libraries")
    format: Literal["text", "json"] = option(
        "text", "json: print one JSON document on stdout; for plan, tune and verify"
    )
