"""Which keys may change when a run is resumed."""

from __future__ import annotations

__all__ = ["CHANGEABLE_KEYS", "CHANGEABLE_SECTIONS", "may_change_on_resume"]


#: Keys that do not affect the trained model and may change on resume: whole sections, and single keys.
CHANGEABLE_SECTIONS = ("launch", "log", "plan", "run", "sink", "strategy", "sweep", "tune")


CHANGEABLE_KEYS = frozenset(
    {
        "checkpoint.every",  # not checkpoint.dir: another folder has nothing to resume from
        "checkpoint.keep",
        "checkpoint.sharded",
        "data.prefetch_factor",
        "data.num_workers",
        "debug",
        "elastic.balance",
        "elastic.first_timeout_s",
        "elastic.hang_timeout_s",
        "elastic.allow_idle",
        "elastic.max_restarts",
        "elastic.max_workers",
        "elastic.min_workers",
        "format",
        "recipe.trust",  # names what may be imported; not passed to the recipe
        "resume",
        "train.activation_checkpointing",  # results are bitwise identical
        "train.device",
        "train.profile",
        "train.stop_at_target",  # only changes where training ends, like a longer train.duration
        "train.target.at_least",
        "train.target.at_most",
        "train.target.metric",
    }
)


def may_change_on_resume(key: str) -> bool:
    """Whether a key never affects the trained model, under any batch policy."""
    return key.partition(".")[0] in CHANGEABLE_SECTIONS or key in CHANGEABLE_KEYS
