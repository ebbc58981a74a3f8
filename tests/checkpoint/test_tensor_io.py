"""Saving and loading tensors: a checkpoint is complete or absent, and loads bit-identical."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from launcher.checkpoint.manifest import (
    CorruptCheckpointError,
    Manifest,
    latest_valid,
    open_checkpoint,
)
from launcher.checkpoint.model_layout import check_tensor_names
from launcher.checkpoint.tensor_io import (
    CheckpointError,
    CheckpointState,
    LazyTensors,
    SaveOptions,
    TensorReader,
    export_safetensors,
    load_checkpoint,
    save_checkpoint,
)
from launcher.errors import UsageError
from tests.helpers.checkpoints import (
    FILES,
    list_names,
    list_updates,
    load_latest_update,
    make_state,
    make_tensors,
    rewrite_manifest,
    run_script,
    save_update,
)


def at_phase(phase: str, act: Callable[[], None]) -> Callable[[str], None]:
    return lambda reached: act() if reached == phase else None


def make_raiser(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# --- content ------------------------------------------------------------------------------------------------------


def test_saved_checkpoint_loads_unchanged(tmp_path: Path) -> None:
    saved = make_state(7, schedule={"history": [[0, 1.0], [640, 2.0]]}, wandb="ab12")
    report = save_checkpoint(tmp_path / "checkpoints", "update-00000007", saved, SaveOptions(2))
    found = latest_valid(tmp_path / "checkpoints")
    assert found is not None
    loaded = load_checkpoint(found)
    torch.testing.assert_close(dict(loaded.model), dict(saved.model), rtol=0, atol=0)
    torch.testing.assert_close(dict(loaded.optimizer), dict(saved.optimizer), rtol=0, atol=0)
    manifest = loaded.manifest
    assert manifest.position == {"samples": 224, "update": 7}
    assert (manifest.plan, manifest.world, manifest.facts) == (saved.plan, 2, saved.facts)
    assert manifest.versions["torch"] == torch.__version__
    assert (found.path, found.skipped) == (report.path, ())
    assert report.bytes == sum((report.path / name).stat().st_size for name in FILES[1:])


def test_checkpoint_folder_holds_safetensors_and_json_manifest(tmp_path: Path) -> None:
    path = save_update(tmp_path, 1).path
    assert list_names(path) == sorted(FILES)
    assert set(safetensors.torch.load_file(path / "model.safetensors")) == {"conv.weight", "conv.bias"}
    assert set(safetensors.torch.load_file(path / "optimizer.safetensors")) == {"conv.weight/momentum_buffer"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["position"]["samples"] == 32
    assert manifest["tensors"]["conv.weight"] == {
        "dtype": "float32",
        "shape": [4, 3],
        "pieces": [["model.safetensors", "conv.weight", 0, 12]],
        "aliases": [],
    }
    for name, facts in manifest["files"].items():
        assert facts["size"] == (path / name).stat().st_size
        assert re.fullmatch("[0-9a-f]{64}", facts["sha256"])


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_checkpoint_is_readable_for_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = save_update(tmp_path / "runs" / "one" / "checkpoints", 1).path
    finally:
        os.umask(before)
    for folder in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.1, -0.0, float("inf"), 5e-324], dtype=torch.float64),
        torch.tensor([[1.5, -2.0], [3e38, 1e-40]], dtype=torch.bfloat16),
        torch.tensor([65504.0], dtype=torch.float16),
        torch.tensor([1 + 2j, -3j], dtype=torch.complex64).conj(),
        torch.tensor([2**62, -1]),
        torch.tensor([[7]], dtype=torch.int32),
        torch.tensor([255, 0], dtype=torch.uint8),
        torch.tensor([True, False, True]),
        torch.tensor(3.5),
        torch.tensor(12, dtype=torch.int64),
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.int64),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(10)[2:9:3],
        torch.ones(2, 2, requires_grad=True),
    ],
    ids=lambda t: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}",
)
def test_every_dtype_and_layout_loads_bit_identical(tmp_path: Path, tensor: torch.Tensor) -> None:
    odd = torch.tensor([1, 2, 3], dtype=torch.uint8)  # its width must not misalign the other columns
    save_checkpoint(tmp_path, "one", make_state(model={"a": odd, "tensor": tensor, "z": odd}), SaveOptions(1))
    loaded = load_checkpoint(open_checkpoint(tmp_path / "one")).model["tensor"]
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    bits, expected = (t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (loaded, tensor))
    assert torch.equal(bits, expected)


def test_read_tensors_survive_truncation_of_their_file(tmp_path: Path) -> None:
    path = save_update(tmp_path, 3).path
    loaded = load_checkpoint(open_checkpoint(path))
    weight = loaded.model["conv.weight"]
    for file in path.iterdir():
        os.truncate(file, 0)
    assert torch.equal(weight.add_(1), torch.full((4, 3), 4.0))
    with pytest.raises(
        CorruptCheckpointError, match=r"conv\.weight/momentum_buffer in optimizer\.safetensors cannot be read"
    ):
        loaded.optimizer["conv.weight/momentum_buffer"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[:3])


def test_tied_tensors_are_stored_once_with_aliases(tmp_path: Path) -> None:
    model = Tied()
    path = save_checkpoint(tmp_path, "one", make_state(model=model.state_dict()), SaveOptions(1)).path
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert set(stored) == {"embed.weight", "whole", "part"}
    found = open_checkpoint(path)
    assert found.manifest.tensors["embed.weight"]["aliases"] == ["head.weight"]
    check_tensor_names(found.manifest, model.state_dict())
    other = Tied()
    other.load_state_dict(dict(load_checkpoint(found).model))
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)


def test_non_dense_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^_extra_state in the state_dict is a dict: make it a tensor, e.g. a buf"):
        save_checkpoint(tmp_path, "one", make_state(model={"_extra_state": {"a": 1}}), SaveOptions(1))  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"^w in the state_dict cannot be saved \(torch.sparse_coo"):
        save_checkpoint(tmp_path, "one", make_state(model={"w": torch.eye(2).to_sparse()}), SaveOptions(1))
    with pytest.raises(UsageError, match=r"torch.complex128 on cpu"):
        save_checkpoint(
            tmp_path, "one", make_state(model={"w": torch.zeros(1, dtype=torch.complex128)}), SaveOptions(1)
        )
    assert list_names(tmp_path) == []


def test_facts_accept_any_json_value(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "one", make_state(scaler={2: 1.0, 10: 0.1}, betas=(0.9, 0.999), name="ü"), SaveOptions(1))
    assert open_checkpoint(tmp_path / "one").manifest.facts == {
        "scaler": {"2": 1.0, "10": 0.1}, "betas": [0.9, 0.999], "name": "ü",
    }  # fmt: skip
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, "two", make_state(wrong=torch.ones(1)), SaveOptions(1))
    assert list_names(tmp_path) == ["one"]


def write_sharded_checkpoint(folder: Path) -> Path:
    """A checkpoint as two ranks write it: rows 0-2 and 3-4 of a 5 x 2 matrix, each in its own file."""
    rows = torch.arange(10.0).reshape(5, 2)
    folder.mkdir(mode=0o700)
    safetensors.torch.save_file({"w": rows[:3].reshape(-1)}, folder / "model-0.safetensors")
    safetensors.torch.save_file({"w": rows[3:].reshape(-1)}, folder / "model-1.safetensors")
    pieces = [["model-0.safetensors", "w", 0, 6], ["model-1.safetensors", "w", 6, 10]]
    files = {file: describe_file(folder / file) for file, _, _, _ in pieces}
    described = {"w": {"dtype": "float32", "shape": [5, 2], "pieces": pieces, "aliases": ["tied"]}}
    (folder / "manifest.json").write_text(Manifest(files, described, {"samples": 0}, {}, 2, {}).to_json())
    return folder


def describe_file(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_pieces_of_several_ranks_form_one_tensor(tmp_path: Path) -> None:
    found = open_checkpoint(write_sharded_checkpoint(tmp_path / "one"))
    loaded = load_checkpoint(found).model
    assert torch.equal(loaded["w"], torch.arange(10.0).reshape(5, 2))
    assert torch.equal(loaded["tied"], loaded["w"])
    read, facts = TensorReader(found.path), found.manifest.tensors["w"]
    for start in range(11):
        for stop in range(start, 11):
            assert read(facts, start, stop).tolist() == list(map(float, range(start, stop)))


def test_reader_opens_only_the_files_needed(tmp_path: Path) -> None:
    found = open_checkpoint(write_sharded_checkpoint(tmp_path / "one"))
    (found.path / "model-1.safetensors").unlink()
    assert TensorReader(found.path)(found.manifest.tensors["w"], 2, 6).tolist() == [2.0, 3.0, 4.0, 5.0]
    with pytest.raises(CorruptCheckpointError, match=r"w in model-1\.safetensors cannot be read"):
        load_checkpoint(found).model["w"]


def test_tensor_that_contradicts_manifest_is_not_loaded(tmp_path: Path) -> None:
    path = save_update(tmp_path, 1).path
    body = json.loads((path / "manifest.json").read_text())
    body["tensors"]["conv.bias"]["dtype"] = "int32"
    rewrite_manifest(path, tensors=body["tensors"])
    with pytest.raises(CorruptCheckpointError, match=r"conv\.bias in model\.safetensors does not match the manifest"):
        load_checkpoint(open_checkpoint(path)).model["conv.bias"]


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    manifest = open_checkpoint(save_update(tmp_path, 1).path).manifest
    check_tensor_names(manifest, make_tensors())
    wrong = {"conv.weight": torch.ones(4, 4), "conv.bias": torch.ones(3).double(), "fc.weight": torch.ones(1)}
    with pytest.raises(UsageError) as error:
        check_tensor_names(manifest, wrong)
    assert "conv.weight is float32[4, 3] in the checkpoint, not float32[4, 4]" in str(error.value)
    assert "conv.bias is float32[3] in the checkpoint, not float64[3]" in str(error.value)
    assert "fc.weight is not in the checkpoint" in str(error.value)
    with pytest.raises(UsageError, match=r"conv\.bias is only in the checkpoint"):
        check_tensor_names(manifest, {"conv.weight": torch.ones(4, 3)})
    many = {**make_tensors(), **{f"more{i}": torch.ones(1) for i in range(9)}}
    with pytest.raises(UsageError, match=r"more4 is not in the checkpoint and 4 more: use the recipe"):
        check_tensor_names(manifest, many)


def test_same_update_can_be_saved_again(tmp_path: Path) -> None:
    os.truncate(save_update(tmp_path, 5).path / "model.safetensors", 3)
    save_update(tmp_path, 5, keep=1)
    assert load_latest_update(tmp_path) == 5
    assert list_updates(tmp_path) == [5]


def test_checkpoint_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../out", "tmp-1", ".hidden", "", "a/b", "a\n"):
        with pytest.raises(ValueError, match="not a valid checkpoint name"):
            save_checkpoint(tmp_path / "in", name, make_state(), SaveOptions(1))
    assert not (tmp_path / "in").exists()


# --- kills, full disks, failures ----------------------------------------------------------------------------------

WRITER = """
import os, sys, torch
from pathlib import Path
from launcher.checkpoint.tensor_io import CheckpointState, SaveOptions, save_checkpoint
phases = []
def killed(phase):
    phases.append(phase)
    if phase == sys.argv[2] and phases.count(phase) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
saved = CheckpointState({"w": torch.ones(9)}, {}, {"update": 2}, {}, 1, {})
save_checkpoint(Path(sys.argv[1]), "update-00000002", saved, SaveOptions(1, inject_fault=killed))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "count"), [("checkpoint-write", 1), ("checkpoint-write", 2), ("checkpoint-rename", 1)]
)
def test_kill_while_saving_leaves_previous_checkpoint_loadable(tmp_path: Path, phase: str, count: int) -> None:
    save_update(tmp_path, 1)
    assert run_script(WRITER, tmp_path, phase, count) == -signal.SIGKILL
    assert [name for name in list_names(tmp_path) if name.startswith("tmp")], "it was killed on the way"
    assert load_latest_update(tmp_path) == 1
    save_update(tmp_path, 3)
    assert list_updates(tmp_path) == [1, 3], "the next save removes what the dead writer left"


@pytest.mark.parametrize("phase", ["checkpoint-write", "checkpoint-rename"])
def test_full_disk_raises_error_and_loses_nothing(tmp_path: Path, phase: str) -> None:
    save_update(tmp_path, 1, keep=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError) as error:
        save_update(tmp_path, 2, keep=1, inject_fault=at_phase(phase, make_raiser(full)))
    assert str(error.value) == f"checkpoint update-00000002 could not be written to {tmp_path}: the disk is full"
    assert list_updates(tmp_path) == [1]
    assert load_latest_update(tmp_path) == 1


@pytest.mark.process
def test_file_size_limit_raises_one_line_error(tmp_path: Path) -> None:
    save_update(tmp_path, 1)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "import torch; from pathlib import Path; from launcher.checkpoint.tensor_io import *\n"
        "saved = CheckpointState({'w': torch.ones(5000)}, {}, {}, {}, 1, {})\n"
        "try: save_checkpoint(Path(sys.argv[1]), 'update-00000002', saved, SaveOptions(1))\n"
        "except CheckpointError as error: print(error)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout == f"checkpoint update-00000002 could not be written to {tmp_path}: File too large\n", ran.stderr
    assert ran.stderr == ""
    assert list_updates(tmp_path) == [1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failed_save_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    save_update(tmp_path, 1)
    with pytest.raises(type(error)):
        save_update(tmp_path, 2, inject_fault=at_phase("checkpoint-rename", make_raiser(error)))
    assert list_names(tmp_path) == ["update-00000001"]


def test_uncreatable_folder_raises_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written to .*: Not a directory"):
        save_update(tmp_path / "file" / "checkpoints", 1)


def test_checkpoint_is_fsynced_before_old_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_update(tmp_path, 1)
    steps: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename")}

    def fsync(number: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")
        real["fsync"](number)

    def rename(source: Path, target: Path) -> None:
        steps.append(f"rename {target.name}".partition("-old")[0])
        real["rename"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save_update(tmp_path, 2, keep=1)
    fresh = f"tmp-update-00000002-{os.getpid()}"
    assert steps == [
        "fsync model.safetensors",
        "fsync optimizer.safetensors",
        "fsync manifest.json",
        f"fsync {fresh}",
        "rename update-00000002",
        f"fsync {tmp_path.name}",
        "rename tmp",
    ]


def test_save_time_comes_from_given_clock(tmp_path: Path) -> None:
    clock = iter([10.0, 12.5])
    assert save_update(tmp_path, 1, clock=lambda: next(clock)).seconds == 2.5


# --- the final parameters -----------------------------------------------------------------------------------------


def save_model_tensors(folder: Path, model: Mapping[str, torch.Tensor]) -> LazyTensors:
    """Return the tensors of a model as stored in a checkpoint."""
    saved = CheckpointState(model, {}, {"samples": 1, "update": 1}, {}, 1, {})
    return load_checkpoint(open_checkpoint(save_checkpoint(folder, "update-1", saved, SaveOptions(1)).path)).model


def test_exported_model_loads_with_plain_safetensors(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    del model.part, other.part  # load_model itself does not support views
    export_safetensors(tmp_path / "model.safetensors", save_model_tensors(tmp_path / "from", model.state_dict()))
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert torch.equal(other.head.weight, model.embed.weight)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


def test_export_equals_safetensors_save_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 2).double(), nn.Linear(3, 3).bfloat16())
    export_safetensors(tmp_path / "ours", save_model_tensors(tmp_path / "from", model.state_dict()))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_exported_tensors_are_aligned_to_element_size(tmp_path: Path) -> None:
    """Data is aligned, so that a reader can map the file in place, for any length of the header."""
    for length in range(1, 9):
        model = {"a" * length: torch.ones(3, dtype=torch.uint8), "b": torch.ones(1).double(), "c": torch.ones(1)}
        export_safetensors(tmp_path / "model.safetensors", save_model_tensors(tmp_path / str(length), model))
        raw = (tmp_path / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        for name, tensor in model.items():
            assert (begin + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_failed_export_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    old, new = (
        save_model_tensors(tmp_path / name, make_tensors(value)) for name, value in (("old", 1.0), ("new", 2.0))
    )
    export_safetensors(path, old)
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda number: make_raiser(full)())
        with pytest.raises(CheckpointError, match=r"model\.safetensors could not be written to .*: the disk is full"):
            export_safetensors(path, new)
    assert path.read_bytes() == before
    assert list_names(tmp_path) == ["model.safetensors", "new", "old"]
    export_safetensors(path, new)
    assert torch.equal(safetensors.torch.load_file(path)["conv.weight"], make_tensors(2.0)["conv.weight"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~get_umask()


def get_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
