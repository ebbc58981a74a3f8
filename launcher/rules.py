"""How the best rate follows the batch, by optimizer, and where that is known to end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from launcher.errors import RequestError
from launcher.settings import Run

__all__ = ["Rule", "far_advice", "far_of", "has_second_moment", "optimizer_of", "power_of", "rule_of", "warmup_advice"]

Rule = Literal["linear", "sqrt", "noise", "none"]

#: How the best rate follows the batch, by optimizer. Those without: their step's length does not depend on the
#: gradient's (sign methods, Rprop, Muon's orthogonal step), so a larger batch changes the direction only.
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("sgd", "asgd", "lars"), "linear"),
    **dict.fromkeys(("adam", "adamw", "nadam", "radam", "adamax", "sparseadam", "lamb", "adafactor"), "sqrt"),
    **dict.fromkeys(("adagrad", "adadelta", "rmsprop"), "sqrt"),
    **dict.fromkeys(("rprop", "lion", "signsgd", "signum", "muon"), "none"),
}
_SQUARES = ("adam", "adamw", "nadam", "radam", "sparseadam", "lamb")  # Adamax keeps a maximum
_SECOND_MOMENT = ("adam", "adamw", "nadam", "adamax", "sparseadam", "lamb")  # RAdam rectifies its own first updates
_FAR = {"linear": 32, "sqrt": 8}  # times the base batch: beyond it no rule was seen to hold


def rule_of(run: Run) -> Rule:
    """lr.rule, under `auto` by the class of the optimizer. RequestError where that class is not known."""
    if run.lr.rule != "auto":
        return run.lr.rule
    rule = _RULES.get(optimizer_of(run))
    if rule is None:
        raise RequestError(
            f"lr.rule=auto does not know optimizer._target_={run.optimizer.get('_target_')}: "
            "type lr.rule=linear, lr.rule=sqrt or lr.rule=none"
        )
    return rule


def optimizer_of(run: Run) -> str:
    """The optimizer's class, in small letters, without the words for where it is computed."""
    name = str(run.optimizer.get("_target_", "")).rpartition(".")[2].lower()
    return re.sub(r"^(deepspeed)?(cpu|fused)?", "", name)


def power_of(run: Run) -> float:
    """The power of the batch's gain that the rate follows: one half for the Adam family, else one."""
    return 0.5 if _RULES.get(optimizer_of(run)) == "sqrt" else 1.0


def has_second_moment(run: Run) -> bool:
    """Whether the optimizer keeps an average of squared gradients, as Adam does."""
    return optimizer_of(run) in _SQUARES


def far_of(run: Run, rule: Rule) -> int | None:
    """How many base batches the rule is good for; None where the rate does not follow the batch."""
    return None if rule == "none" else _FAR.get(_RULES.get(optimizer_of(run), rule))


def far_advice(run: Run, rule: Rule, kappa: float) -> str:
    """One line where the batch is `kappa` base batches and that is too many, else nothing."""
    far = far_of(run, rule)
    if far is None or kappa <= far:
        return ""
    return (
        f"the global batch is more than {far} x lr.base_batch={run.lr.base_batch}, where lr.rule={rule} often fails: "
        "tune lr.base at a larger lr.base_batch, or use a smaller batch"
    )


def warmup_advice(run: Run, warmup: int, duration: int, batch: int) -> str:
    """One line where an Adam warms up over fewer samples than its second moment needs, else nothing."""
    if optimizer_of(run) not in _SECOND_MOMENT:
        return ""
    beta2 = float(run.optimizer.get("betas", (0.9, 0.999))[1])
    updates = 2 / (1 - beta2) if beta2 < 1 else 0.0
    if warmup >= min(updates * batch, duration / 10):
        return ""
    return (
        f"schedule.warmup={run.schedule.warmup} is under the {updates:.0f} updates, 2/(1 - beta2), in which Adam's "
        "second moment settles, and under 10 % of train.duration: consider schedule.warmup=0.1dur"
    )
