"""Tensors in and out of a checkpoint: safetensors and JSON, one format for every strategy and world size, no pickle."""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from launcher.errors import RequestError
from launcher.manifest import MANIFEST, CheckpointDamaged, Found, HashedFile, Manifest, prune, publish, write_atomically

__all__ = ["CheckpointError", "Loaded", "Report", "Saved", "check_names", "load", "save", "save_model"]


class CheckpointError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


@dataclass(frozen=True)
class Saved:
    """What to save: tensors by the names of the recipe's model, the optimizer's as `<parameter>/<slot>`, and JSON."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    position: Mapping[str, int]
    plan: Mapping[str, Any]
    world: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    name: str
    path: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's tensors on the CPU, aliases of tied ones included, and its manifest."""

    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    manifest: Manifest


def save(
    folder: Path, name: str, saved: Saved, keep: int, protect: frozenset[str], fault: Callable[[str], None]
) -> Report:
    """Write `saved` as `folder/name`, then let go of all but the newest `keep` and the protected.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    start = time.monotonic()
    groups = {"model.safetensors": saved.model, "optimizer.safetensors": saved.optimizer}
    try:
        with publish(folder, name, fault) as fresh:
            files: dict[str, Mapping[str, Any]] = {}
            tensors: dict[str, Mapping[str, Any]] = {}
            for file, group in groups.items():
                unique, described = lay_out(group, file)
                files[file] = write(fresh / file, safetensors.torch.save(unique))
                tensors |= described
                fault("checkpoint-write")
            manifest = Manifest(files, tensors, saved.position, saved.plan, saved.world, versions(), saved.facts)
            write(fresh / MANIFEST, manifest.to_json().encode())
        prune(folder, keep, protect | {name})
    except OSError as problem:
        reason = "the disk is full" if problem.errno == errno.ENOSPC else problem.strerror or str(problem)
        raise CheckpointError(
            problem.errno, f"checkpoint {name} could not be written to {folder}: {reason}"
        ) from problem
    size = sum(facts["size"] for facts in files.values())
    return Report(name, folder / name, size, time.monotonic() - start)


def write(path: Path, data: bytes) -> Mapping[str, Any]:
    file = HashedFile(path)
    file.write(data)
    return file.close()


def lay_out(group: Mapping[str, torch.Tensor], file: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The tensors to write, tied ones once, and how the manifest describes them. `file` is where they will lie."""
    unique: dict[str, torch.Tensor] = {}
    owners: dict[tuple[Any, ...], str] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, tensor in group.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = owners.setdefault(identity, name) if tensor.numel() else name
        if owner != name:
            described[owner]["aliases"].append(name)
            continue
        unique[name] = tensor.detach().cpu().contiguous()
        if any(unique[name].data_ptr() == u.data_ptr() for n, u in unique.items() if n != name and u.numel()):
            unique[name] = unique[name].clone()  # a view into another tensor: safetensors takes no shared memory
        described[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "pieces": [[file, name, 0, tensor.numel()]],
            "aliases": [],
        }
    return unique, described


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "safetensors": safetensors.__version__}


def load(found: Found) -> Loaded:
    """The tensors of a verified checkpoint, put together from their pieces."""
    model: dict[str, torch.Tensor] = {}
    optimizer: dict[str, torch.Tensor] = {}
    read = Reader(found.path)
    for name, facts in found.manifest.tensors.items():
        tensor = read.whole(facts)
        group = optimizer if facts["pieces"][0][0].startswith("optimizer") else model
        for alias in (name, *facts["aliases"]):
            group[alias] = tensor
    return Loaded(model, optimizer, found.manifest)


class Reader:
    """Reads pieces; each file is opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, dict[str, torch.Tensor]] = {}

    def whole(self, facts: Mapping[str, Any]) -> torch.Tensor:
        pieces = [self._file(file)[key].reshape(-1) for file, key, _, _ in facts["pieces"]]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat.reshape(facts["shape"])

    def _file(self, name: str) -> dict[str, torch.Tensor]:
        if name not in self._files:
            try:
                self._files[name] = safetensors.torch.load_file(self._folder / name)
            except safetensors.SafetensorError as problem:
                raise CheckpointDamaged(f"{name} cannot be read: {problem}") from problem
        return self._files[name]


def check_names(manifest: Manifest, expected: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        RequestError: the checkpoint is of another model; the first five differences are named.
    """
    saved = {
        alias: (tuple(facts["shape"]), facts["dtype"])
        for name, facts in manifest.tensors.items()
        if facts["pieces"][0][0].startswith("model")
        for alias in (name, *facts["aliases"])
    }
    present = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in expected.items()}
    if differences := list(differing(saved, present)):
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise RequestError(
            f"the checkpoint is of another model: {'; '.join(differences[:5])}{more}: "
            f"give the recipe it was trained with, or start anew with run.name=… or resume=never"
        )


def differing(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterable[str]:
    for name in [*present, *(name for name in saved if name not in present)]:
        if name not in saved:
            yield f"{name} is not in it"
        elif name not in present:
            yield f"{name} is in it alone"
        elif saved[name] != present[name]:
            yield f"{name} has {saved[name]} in it instead of {present[name]}"


def save_model(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """The final parameters as one file that `safetensors.torch.load_model` takes without this program."""
    unique, described = lay_out(tensors, path.name)
    aliases = {alias: name for name, facts in described.items() for alias in facts["aliases"]}
    write_atomically(path, safetensors.torch.save(unique, metadata={"format": "pt", **aliases}))
