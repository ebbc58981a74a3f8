"""When and what a run saves: its checkpoints, the best one among them, and what is left when it has finished."""

from __future__ import annotations

__all__ = ["Saver"]
