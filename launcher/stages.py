"""The stages of an update."""

from __future__ import annotations

__all__ = ["BY_SAMPLE", "STAGES"]

#: In the order in which a rank's stage times travel in the vote.
STAGES = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")
#: A rank's own work that grows with its share of the batch. In the others it waits for other ranks, steps once per
#: update whatever its share, or does what only rank 0 has to do.
BY_SAMPLE = ("data", "transfer", "forward", "backward")
