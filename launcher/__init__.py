"""A distributed training launcher with elastic batch scaling.

import launcher
status = launcher.run(["recipe=resnet", "run.name=mine"])
model = launcher.load("runs/mine")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load", "run"]


def run(args: Sequence[str]) -> int:
    """Run a command as `launcher` does with these arguments; print its errors, and return its exit status.

    `["recipe=resnet"]` trains and returns when training has ended. It may be called from any thread and several times,
    e.g. from a notebook. In the main thread, Ctrl-C and SIGTERM save and stop; in another thread the signals stay with
    the calling program, and a file named `stop` in the run directory, or `run(["stop", "runs/mine"])`, does the same.
    """
    if isinstance(args, str):
        raise TypeError(f"launcher.run takes a list of arguments: type launcher.run({args.split()})")
    from launcher.cli.main import main

    return main(args)


def load(run: str | Path, trust: Sequence[str] = ()) -> nn.Module:
    """Load the trained model of a finished run, in evaluation mode on the CPU.

    `trust` lists the modules or classes of your own recipes: a run directory is data and cannot grant trust itself.

    Raises:
        UsageError: the recipe is not trusted, its fields no longer match the run, or a link leads out of the run.
        FileNotFoundError: the run does not exist or has not finished.
    """
    import json

    import torch
    import yaml
    from safetensors import safe_open
    from safetensors.torch import load_file

    from launcher.checkpoint.tensor_io import CHANGED_BUFFERS
    from launcher.recipe import build_recipe
    from launcher.run_dir.outward_links import refuse_outward_links
    from launcher.run_dir.run_directory import RunDirectory
    from launcher.strategies.extra_state import load_exported_model

    run_dir = RunDirectory(Path(run))
    refuse_outward_links(run_dir.path)
    spec = yaml.safe_load(run_dir.run_yaml.read_text())["recipe"]
    model: nn.Module = build_recipe({**spec, "trust": list(trust)}).model()
    with safe_open(run_dir.model, framework="pt") as file:
        metadata = file.metadata() or {}
    if CHANGED_BUFFERS in metadata:
        from launcher.strategies.buffer_layout import adopt_buffers

        tensors = load_file(run_dir.model)
        tensors.update({alias: tensors[name] for alias, name in metadata.items() if name in tensors})
        adopt_buffers(model, json.loads(metadata[CHANGED_BUFFERS]), tensors, torch.device("cpu"))
    load_exported_model(model, run_dir.model)
    return model.eval()
