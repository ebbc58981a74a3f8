"""How a call of `train` ended, and so what comes next."""

from __future__ import annotations

from enum import Enum, auto

from launcher.distributed.stop_requests import StopLevel

__all__ = ["TrainOutcome"]


class TrainOutcome(Enum):
    """COMPLETE: training has reached its end or its target. The others name what comes next before it continues."""

    COMPLETE = auto()
    REPLAN = auto()  # continue at once, with other shares or another batch
    ADMIT_NODES = auto()  # continue after waiting nodes have joined
    STOP = auto()  # exit after saving
    RESTART = auto()  # exit after saving, to be restarted by the agent

    @classmethod
    def from_stop_level(cls, level: StopLevel) -> TrainOutcome:
        """What the agreed request asks for; without one, training was interrupted for a new plan."""
        return cls.REPLAN if level == StopLevel.CONTINUE else cls[level.name]
