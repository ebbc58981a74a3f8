"""The stages of an update."""

from __future__ import annotations

__all__ = ["PER_SAMPLE_STAGES", "STAGES"]

#: In the order in which stage times are packed in RankStats. `other` includes validation. What a rank is doing now
#: is a phase instead, for the watchdog: `launcher.distributed.hang_detection.PHASES`.
STAGES = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")
#: Stages that are a rank's own work and grow with its share of the batch. In the other stages a rank waits for other
#: ranks, does a fixed amount per update, or does work that only rank 0 has.
PER_SAMPLE_STAGES = ("data", "transfer", "forward", "backward")
