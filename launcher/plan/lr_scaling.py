"""Learning rate scaling rules by optimizer, and the batch size up to which they are known to hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from launcher.config.schema import RunConfig
from launcher.errors import UsageError

__all__ = [
    "Rule",
    "batch_ratio_warning",
    "check_warmup_length",
    "has_second_moment",
    "max_batch_ratio",
    "noise_exponent",
    "optimizer_name",
    "resolve_lr_rule",
]

Rule = Literal["linear", "sqrt", "noise", "none"]

#: How the best learning rate scales with the batch, by optimizer. Those with "none" take steps whose length does not
#: depend on the gradient's (sign methods, Rprop, Muon's orthogonal step), so a larger batch only changes the direction.
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("sgd", "asgd", "lars"), "linear"),
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "adamax", "sparseadam", "lamb", "adafactor"), "sqrt"),
    **dict.fromkeys(("adagrad", "adadelta", "rmsprop"), "sqrt"),
    **dict.fromkeys(("rprop", "lion", "signsgd", "signum", "muon"), "none"),
}
_SQUARED_GRADIENT_OPTIMIZERS = (
    "adam",
    "adamw",
    "nadam",
    "radam",
    "sparseadam",
    "lamb",
)  # not Adamax, which keeps a maximum
_SECOND_MOMENT_OPTIMIZERS = (
    "adam",
    "adamw",
    "nadam",
    "adamax",
    "sparseadam",
    "lamb",
)  # RAdam corrects its first updates itself
_MAX_BATCH_RATIOS = {"linear": 32, "sqrt": 8}  # multiples of the base batch beyond which no rule was observed to hold


def resolve_lr_rule(config: RunConfig) -> Rule:
    """lr.rule; `auto` is resolved by the optimizer's class. Raises UsageError if that class is unknown."""
    if config.lr.rule != "auto":
        return config.lr.rule
    rule = _RULES.get(optimizer_name(config))
    if rule is None:
        raise UsageError(
            f"lr.rule=auto does not know optimizer._target_={config.optimizer.get('_target_')}: "
            "type lr.rule=linear, lr.rule=sqrt or lr.rule=none"
        )
    return rule


def optimizer_name(config: RunConfig) -> str:
    """The optimizer's class name in lower case, without prefixes for its implementation (DeepSpeed, CPU, fused)."""
    name = str(config.optimizer.get("_target_", "")).rpartition(".")[2].lower()
    return re.sub(r"^(deepspeed)?(cpu|fused)?", "", name)


def noise_exponent(config: RunConfig) -> float:
    """The exponent of the batch's gain in the learning rate: 0.5 for the Adam family, otherwise 1."""
    return 0.5 if _RULES.get(optimizer_name(config)) == "sqrt" else 1.0


def has_second_moment(config: RunConfig) -> bool:
    """Whether the optimizer keeps an average of squared gradients, as Adam does, that can be rescaled."""
    return optimizer_name(config) in _SQUARED_GRADIENT_OPTIMIZERS


def max_batch_ratio(config: RunConfig, rule: Rule) -> int | None:
    """The multiple of the base batch up to which the rule holds; None if the learning rate does not scale."""
    return None if rule == "none" else _MAX_BATCH_RATIOS.get(_RULES.get(optimizer_name(config), rule))


def batch_ratio_warning(config: RunConfig, rule: Rule, kappa: float) -> str:
    """A one-line warning if a batch of `kappa` base batches is beyond the rule's validity, otherwise empty."""
    ratio = max_batch_ratio(config, rule)
    if ratio is None or kappa <= ratio:
        return ""
    return (
        f"the global batch is more than {ratio} x lr.base_batch={config.lr.base_batch}, where lr.rule={rule} often "
        "fails: tune lr.base at a larger lr.base_batch, or use a smaller batch"
    )


def check_warmup_length(config: RunConfig, warmup: int, duration: int, batch: int) -> str:
    """A one-line warning if Adam's warmup is shorter than its second moment needs, otherwise empty."""
    if optimizer_name(config) not in _SECOND_MOMENT_OPTIMIZERS:
        return ""
    beta2 = float(config.optimizer.get("betas", (0.9, 0.999))[1])
    updates = 2 / (1 - beta2) if beta2 < 1 else 0.0
    if warmup >= min(updates * batch, duration / 10):
        return ""
    return (
        f"schedule.warmup={config.schedule.warmup} is shorter than the {updates:.0f} updates, 2/(1 - beta2), that "
        "Adam's second moment needs to settle, and than 10 % of train.duration: consider schedule.warmup=0.1dur"
    )
