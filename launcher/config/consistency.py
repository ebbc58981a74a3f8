"""Check that keys do not contradict each other, regardless of the world size, before anything is planned."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.limits import get_value, iter_limit_errors
from launcher.config.schema import ElasticConfig, RunConfig
from launcher.errors import UsageError

__all__ = ["iter_target_errors", "list_watched_metrics", "validate_dataset_sizes", "validate_for_plan"]


def validate_for_plan(config: RunConfig) -> None:
    """Raise UsageError for the first setting that is wrong regardless of world size and data."""
    for problem in iter_limit_errors(config):
        raise UsageError(problem)
    _check_optimizer(config)
    _check_lr(config)
    _check_batch(config)
    _check_schedule(config)
    for problem in iter_target_errors(config):
        raise UsageError(problem)
    if config.elastic.exact:
        _check_exact(config)
    elif config.elastic.shards != ElasticConfig().shards:
        raise UsageError(
            f"elastic.shards={config.elastic.shards} has no effect without elastic.exact=true: "
            "type that too, or neither"
        )
    if config.tune.sizes is not None and config.tune.max is not None:
        raise UsageError(f"tune.max={config.tune.max} has no effect if tune.sizes is set: remove one of them")


def iter_target_errors(config: RunConfig) -> Iterator[str]:
    """One line for each part of train.target that is missing or superfluous, and for each metric that cannot exist."""
    target = config.train.target
    bounds = [bound for bound in (target.at_least, target.at_most) if bound is not None]
    if target.metric is None and bounds:
        yield "train.target.metric is not set: type the metric to watch, e.g. train.target.metric=val/accuracy"
    if target.metric is not None and len(bounds) != 1:
        yield (
            f"train.target.metric={target.metric} needs either train.target.at_least= or train.target.at_most=: "
            "type one of them, e.g. train.target.at_least=0.95"
        )
    if config.train.stop_at_target and target.metric is None:
        yield "train.stop_at_target=true has no target: type train.target.metric=val/accuracy and a bound"
    for key, metric in list_watched_metrics(config).items():
        name = metric.rpartition("/")[2]
        if metric != f"val/{name}" or not name:
            hint = f"did you mean {key}=val/{name}? " if name else ""
            yield (
                f"{key}={metric} is not measured in validation: {hint}Type val/loss, or val/NAME, where NAME is a "
                "metric that the recipe's loss() gives"
            )


def list_watched_metrics(config: RunConfig) -> dict[str, str]:
    """The metrics of validation that something depends on, by the key that names each."""
    watched = {
        "train.target.metric": config.train.target.metric,
        "checkpoint.best": config.checkpoint.best,
        "schedule.metric": config.schedule.metric if config.schedule.decay == "plateau" else None,
    }
    return {key: metric for key, metric in watched.items() if metric is not None}


def validate_dataset_sizes(config: RunConfig, train: int, val: int) -> None:
    """Raise UsageError if training or validation data are empty, or batch.global exceeds the training set."""
    if train < 1:
        raise UsageError("recipe: the training data are empty: point the recipe at a folder or split with samples")
    if val < 1 and config.train.validate_every is not None:
        raise UsageError(
            f"train.validate_every={config.train.validate_every} but the recipe's validation data are empty: "
            "add validation samples, or type train.validate_every=null"
        )
    for key, metric in list_watched_metrics(config).items() if val < 1 else ():
        fix = "type another schedule" if key == "schedule.metric" else f"remove {key}"
        raise UsageError(
            f"{key}={metric} but the recipe's validation data are empty, so it is never measured: "
            f"add validation samples, or {fix}"
        )
    global_batch = config.batch.global_batch
    if isinstance(global_batch, int) and global_batch > train:
        raise UsageError(
            f"batch.global={global_batch} exceeds the {train} training samples: "
            f"type batch.global=full, or {train} or less"
        )


def _check_optimizer(config: RunConfig) -> None:
    """Refuse what torch's own optimizers refuse once they are made, and those that the training loop cannot run."""
    optimizer = config.optimizer
    if optimizer.get("_target_") == "torch.optim.LBFGS":
        raise UsageError(
            "optimizer._target_=torch.optim.LBFGS needs a closure that computes the loss again within a step, which is "
            "not supported: type optimizer=sgd, optimizer=adamw or optimizer=rprop"
        )
    if "lr" in optimizer:
        raise UsageError(f"optimizer.lr={optimizer['lr']} is not used: type lr.base={optimizer['lr']} instead")
    for key, wrong in (("momentum", not optimizer.get("momentum")), ("dampening", bool(optimizer.get("dampening")))):
        if optimizer.get("_target_") == "torch.optim.SGD" and optimizer.get("nesterov") is True and wrong:
            raise UsageError(
                f"optimizer.{key}={optimizer.get(key, 0)} does not work with optimizer.nesterov=true: type "
                "optimizer.nesterov=false too"
            )


def _check_lr(config: RunConfig) -> None:
    for key in ("lr.base", "lr.base_batch"):
        if get_value(config, key) is None:
            raise UsageError(
                f"{key} is not set: type e.g. lr.base=0.1 lr.base_batch=256, a learning rate and its global batch"
            )


def _check_batch(config: RunConfig) -> None:
    batch = config.batch
    if batch.policy in ("scale", "hold") and batch.global_batch == "divisible":
        raise UsageError(
            "batch.global=divisible works only with launcher plan, which finds the batch: type launcher plan "
            "batch.global=divisible batch.max_global=4096, and then batch.global=N with the number that it shows"
        )
    bound = next((key for key in ("batch.min_global", "batch.max_global") if get_value(config, key) is not None), None)
    if batch.policy == "bounded":
        if bound is None:
            raise UsageError("batch.policy=bounded has no bound: type batch.min_global=N, batch.max_global=N or both")
        if batch.global_batch is not None:
            raise UsageError(
                f"batch.global={batch.global_batch} does not work with batch.policy=bounded: type batch=hold, "
                "or remove it"
            )
    elif batch.policy == "goodput":
        _check_goodput(config)
    elif bound is not None:
        setting = f"{bound}={get_value(config, bound)}"
        raise UsageError(f"{setting} has no effect under batch.policy={batch.policy}: type batch=bounded, or remove it")
    if batch.policy == "hold" and batch.global_batch is None:
        raise UsageError("batch.policy=hold needs a global batch: type batch.global=256 or batch.global=full")


def _check_goodput(config: RunConfig) -> None:
    """Refuse settings that the goodput policy chooses itself or that would conflict with it."""
    batch = config.batch
    conflicts = {
        "batch.global": (batch.global_batch is not None, "batch=hold, or remove it"),
        "batch.ramp": (batch.ramp is not None, "batch=bounded, or remove it"),
        "elastic.balance": (config.elastic.balance, "elastic.balance=false"),
    }
    for key, (refused, fix) in conflicts.items():
        if refused:
            value = str(get_value(config, key)).lower()
            raise UsageError(f"{key}={value} does not work with batch.policy=goodput: type {fix}")


def _check_schedule(config: RunConfig) -> None:
    schedule = config.schedule
    if schedule.decay == "step" and bool(schedule.milestones) == (schedule.every is not None):
        raise UsageError(
            f"schedule.milestones={list(schedule.milestones)} with schedule.every={schedule.every}: schedule=step "
            "needs exactly one: type schedule.milestones=[30ep,60ep], or schedule.every=30ep schedule.milestones=[]"
        )
    if schedule.momentum is not None:
        _check_momentum(config, tuple(schedule.momentum))
    if schedule.decay == "onecycle" and schedule.warmup_from != "zero":
        setting = f"schedule.warmup_from={schedule.warmup_from}"
        raise UsageError(f"{setting} has no effect under schedule=onecycle: type schedule.start=0.04 instead")


def _check_momentum(config: RunConfig, momentum: tuple[float, ...]) -> None:
    if config.schedule.decay != "onecycle":
        raise UsageError(
            f"schedule.momentum={list(momentum)} has no effect under schedule={config.schedule.decay}: "
            "type schedule=onecycle, or optimizer.momentum"
        )
    if len(momentum) != 2 or not 0 <= momentum[0] <= momentum[1] < 1:
        raise UsageError(f"schedule.momentum={list(momentum)} is not [low, high] between 0 and 1: type [0.85,0.95]")


def _check_exact(config: RunConfig) -> None:
    """Refuse settings that bitwise equality at every world size rules out."""
    batch, shards = config.batch, config.elastic.shards
    if shards & (shards - 1):
        below = 1 << (shards.bit_length() - 1)
        raise UsageError(f"elastic.shards={shards} is not a power of two: type elastic.shards={below} or {2 * below}")
    if batch.policy in ("bounded", "goodput") or batch.global_batch is None:
        raise UsageError(
            f"batch.policy={batch.policy} with elastic.exact=true: the batch must be the same at every world size: "
            "type batch.policy=hold batch.global=256"
        )
    conflicts = {
        "batch.accumulation": (batch.accumulation != "auto", "auto"),
        "train.precision": (config.train.precision == "fp16", "bf16"),
        "train.compile": (config.train.compile, "false"),
        "strategy.name": (config.strategy.name != "ddp", "ddp"),
        "elastic.balance": (config.elastic.balance, "false"),
        "launch.threads": (config.launch.threads not in (None, 1), "1"),
    }
    for key, (refused, fix) in conflicts.items():
        if refused:
            value = str(get_value(config, key)).lower()
            raise UsageError(f"{key}={value} does not work with elastic.exact=true: type {key}={fix}")
