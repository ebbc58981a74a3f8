"""Small checkpoints for tests: a model of two tensors, saved at numbered updates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.manifest import (
    compute_manifest_digest,
    latest_valid,
)
from launcher.checkpoint.tensor_io import (
    CheckpointState,
    SaveOptions,
    SaveResult,
    load_checkpoint,
    save_checkpoint,
)

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors")


def make_tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.full((4, 3), float(value)), "conv.bias": torch.arange(3.0) + value}


def make_state(update: int = 1, model: Mapping[str, torch.Tensor] | None = None, **facts: Any) -> CheckpointState:
    return CheckpointState(
        model=make_tensors(update) if model is None else model,
        optimizer={"conv.weight/momentum_buffer": torch.full((4, 3), -float(update))},
        position={"samples": 32 * update, "update": update},
        plan={"shares": [16, 16], "per_device": 16, "accumulation": 1},
        world=2,
        facts=facts,
    )


def save_update(folder: Path, update: int, keep: int = 9, **options: Any) -> SaveResult:
    return save_checkpoint(folder, f"update-{update:08d}", make_state(update), SaveOptions(keep, **options))


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def list_updates(folder: Path) -> list[int]:
    return [int(name.removeprefix("update-")) for name in list_names(folder)]


def load_latest_update(folder: Path) -> int:
    found = latest_valid(folder)
    assert found is not None
    loaded = load_checkpoint(found)
    update = loaded.manifest.position["update"]
    torch.testing.assert_close(dict(loaded.model), make_tensors(update), rtol=0, atol=0)
    return int(update)


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change a manifest and recompute its hash."""
    body = json.loads((path / "manifest.json").read_text())
    body = {name: value for name, value in {**body, **changes}.items() if name != "sha256" and value is not None}
    (path / "manifest.json").write_text(json.dumps(body | {"sha256": compute_manifest_digest(body)}))


def run_script(script: str, *args: object) -> int:
    argv = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(argv, timeout=120, check=False).returncode
