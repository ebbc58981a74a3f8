"""A distributed training launcher with elastic batch scaling.

import launcher
model = launcher.load("runs/resnet-20261121-101500")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load"]


def load(run: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """The trained model of a finished run, in evaluation mode on the CPU.

    `trust` names the module or class of a recipe of your own: a run folder is data and cannot grant that itself.

    Raises:
        RequestError: the recipe is not trusted or fits no more.
        FileNotFoundError: there is no such run, or it has not finished.
    """
    import yaml
    from safetensors.torch import load_model

    from launcher.recipe import build

    folder = Path(run)
    spec = yaml.safe_load((folder / "run.yaml").read_text())["recipe"]
    model: nn.Module = build({**spec, "trust": list(trust)}).model()
    load_model(model, folder / "model.safetensors")
    return model.eval()
