"""The stages of an update."""

from __future__ import annotations

__all__ = ["STAGES"]

#: In the order in which a rank's stage times travel in the vote.
STAGES = ("data", "transfer", "forward", "backward", "sync", "optimizer", "checkpoint", "other")
