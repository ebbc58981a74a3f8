"""A checkpoint is complete or absent, only data that matches its hashes is used, and none is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
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
    compute_manifest_digest,
    latest_valid,
    newest_first,
    open_checkpoint,
)
from launcher.checkpoint.tensor_io import (
    CheckpointError,
    CheckpointState,
    LazyTensors,
    SaveOptions,
    SaveResult,
    TensorReader,
    check_tensor_names,
    export_safetensors,
    load_checkpoint,
    save_checkpoint,
)
from launcher.errors import UsageError

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors")


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.full((4, 3), float(value)), "conv.bias": torch.arange(3.0) + value}


def state(update: int = 1, model: Mapping[str, torch.Tensor] | None = None, **facts: Any) -> CheckpointState:
    return CheckpointState(
        model=tensors(update) if model is None else model,
        optimizer={"conv.weight/momentum_buffer": torch.full((4, 3), -float(update))},
        position={"samples": 32 * update, "update": update},
        plan={"shares": [16, 16], "per_device": 16, "accumulation": 1},
        world=2,
        facts=facts,
    )


def put(folder: Path, update: int, keep: int = 9, **options: Any) -> SaveResult:
    return save_checkpoint(folder, f"update-{update:08d}", state(update), SaveOptions(keep, **options))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def updates(folder: Path) -> list[int]:
    return [int(name.removeprefix("update-")) for name in names(folder)]


def chosen(folder: Path) -> int:
    found = latest_valid(folder)
    assert found is not None
    loaded = load_checkpoint(found)
    update = loaded.manifest.position["update"]
    torch.testing.assert_close(dict(loaded.model), tensors(update), rtol=0, atol=0)
    return int(update)


def at(phase: str, act: Callable[[], None]) -> Callable[[str], None]:
    return lambda reached: act() if reached == phase else None


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# --- content ------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = state(7, schedule={"history": [[0, 1.0], [640, 2.0]]}, wandb="ab12")
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


def test_the_folder_is_safetensors_and_json_under_the_names_given(tmp_path: Path) -> None:
    path = put(tmp_path, 1).path
    assert names(path) == sorted(FILES)
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


def test_it_is_private(tmp_path: Path) -> None:
    path = put(tmp_path / "runs" / "one" / "checkpoints", 1).path
    for folder in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


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
def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path: Path, tensor: torch.Tensor) -> None:
    odd = torch.tensor([1, 2, 3], dtype=torch.uint8)  # its width must not misalign the other columns
    save_checkpoint(tmp_path, "one", state(model={"a": odd, "tensor": tensor, "z": odd}), SaveOptions(1))
    loaded = load_checkpoint(open_checkpoint(tmp_path / "one")).model["tensor"]
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    bits, expected = (t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (loaded, tensor))
    assert torch.equal(bits, expected)


def test_what_was_read_outlives_its_file_and_what_was_not_is_missed_by_name(tmp_path: Path) -> None:
    path = put(tmp_path, 3).path
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


def test_tied_tensors_are_there_once_with_their_aliases(tmp_path: Path) -> None:
    model = Tied()
    path = save_checkpoint(tmp_path, "one", state(model=model.state_dict()), SaveOptions(1)).path
    stored = safetensors.torch.load_file(path / "model.safetensors")
    assert set(stored) == {"embed.weight", "whole", "part"}
    found = open_checkpoint(path)
    assert found.manifest.tensors["embed.weight"]["aliases"] == ["head.weight"]
    check_tensor_names(found.manifest, model.state_dict())
    other = Tied()
    other.load_state_dict(dict(load_checkpoint(found).model))
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)


def test_what_is_no_dense_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^_extra_state in the state_dict is a dict: make it a tensor, e.g. a buf"):
        save_checkpoint(tmp_path, "one", state(model={"_extra_state": {"a": 1}}), SaveOptions(1))  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"^w in the state_dict cannot be saved \(torch.sparse_coo"):
        save_checkpoint(tmp_path, "one", state(model={"w": torch.eye(2).to_sparse()}), SaveOptions(1))
    with pytest.raises(UsageError, match=r"torch.complex128 on cpu"):
        save_checkpoint(tmp_path, "one", state(model={"w": torch.zeros(1, dtype=torch.complex128)}), SaveOptions(1))
    assert names(tmp_path) == []


def test_facts_are_any_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "one", state(scaler={2: 1.0, 10: 0.1}, betas=(0.9, 0.999), name="ü"), SaveOptions(1))
    assert open_checkpoint(tmp_path / "one").manifest.facts == {
        "scaler": {"2": 1.0, "10": 0.1}, "betas": [0.9, 0.999], "name": "ü",
    }  # fmt: skip
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, "two", state(wrong=torch.ones(1)), SaveOptions(1))
    assert names(tmp_path) == ["one"]


def sharded(folder: Path) -> Path:
    """A checkpoint as two ranks write it: rows 0-2 and 3-4 of a 5 x 2 matrix, each in its own file."""
    rows = torch.arange(10.0).reshape(5, 2)
    folder.mkdir(mode=0o700)
    safetensors.torch.save_file({"w": rows[:3].reshape(-1)}, folder / "model-0.safetensors")
    safetensors.torch.save_file({"w": rows[3:].reshape(-1)}, folder / "model-1.safetensors")
    pieces = [["model-0.safetensors", "w", 0, 6], ["model-1.safetensors", "w", 6, 10]]
    files = {file: facts_of(folder / file) for file, _, _, _ in pieces}
    described = {"w": {"dtype": "float32", "shape": [5, 2], "pieces": pieces, "aliases": ["tied"]}}
    (folder / "manifest.json").write_text(Manifest(files, described, {"samples": 0}, {}, 2, {}).to_json())
    return folder


def facts_of(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_pieces_of_several_writers_make_one_tensor(tmp_path: Path) -> None:
    found = open_checkpoint(sharded(tmp_path / "one"))
    loaded = load_checkpoint(found).model
    assert torch.equal(loaded["w"], torch.arange(10.0).reshape(5, 2))
    assert torch.equal(loaded["tied"], loaded["w"])
    read, facts = TensorReader(found.path), found.manifest.tensors["w"]
    for start in range(11):
        for stop in range(start, 11):
            assert read(facts, start, stop).tolist() == list(map(float, range(start, stop)))


def test_a_reader_opens_only_the_files_it_needs(tmp_path: Path) -> None:
    found = open_checkpoint(sharded(tmp_path / "one"))
    (found.path / "model-1.safetensors").unlink()
    assert TensorReader(found.path)(found.manifest.tensors["w"], 2, 6).tolist() == [2.0, 3.0, 4.0, 5.0]
    with pytest.raises(CorruptCheckpointError, match=r"w in model-1\.safetensors cannot be read"):
        load_checkpoint(found).model["w"]


# --- corrupt checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2).path / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = latest_valid(tmp_path)
        assert found is not None
        if found.path.name == "update-00000002":  # a space in the manifest's layout: its content is the same
            assert name == "manifest.json"
            assert json.loads(flipped) == json.loads(whole)
        else:
            assert [who for who, _ in found.skipped] == ["update-00000002"]
            assert chosen(tmp_path) == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["cut short", "empty", "longer", "missing"])
def test_a_file_of_the_wrong_size_is_found(tmp_path: Path, name: str, harm: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2).path / name
    if harm == "missing":
        path.unlink()
    else:
        size = path.stat().st_size
        os.truncate(path, {"cut short": size - 1, "empty": 0, "longer": size + 8}[harm])
    found = latest_valid(tmp_path)
    assert found is not None
    ((who, why),) = found.skipped
    assert who == "update-00000002"
    assert name in why or "manifest" in why
    assert chosen(tmp_path) == 1


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "link in place of a file"])
def test_only_files_are_trusted_inside_a_checkpoint(tmp_path: Path, kind: str) -> None:
    put(tmp_path, 1)
    path = put(tmp_path, 2).path
    if kind == "link":
        (path / "more.safetensors").symlink_to(tmp_path / "update-00000001" / "model.safetensors")
    elif kind == "pipe":
        os.mkfifo(path / "more.safetensors")
    elif kind == "folder":
        (path / "more").mkdir()
    else:
        (path / "model.safetensors").rename(tmp_path / "elsewhere")
        (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    found = latest_valid(tmp_path)
    assert found is not None
    assert "not allowed in a checkpoint folder" in found.skipped[0][1]
    with pytest.raises(UsageError, match=r"is damaged: .* not allowed in a checkpoint folder"):
        open_checkpoint(path)
    assert chosen(tmp_path) == 1


def test_a_link_or_a_pipe_among_the_checkpoints_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", 9)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "update-00000009").symlink_to(tmp_path / "elsewhere" / "update-00000009")
    with pytest.raises(UsageError, match="update-00000009: is a link, which is not allowed in a checkpoint folder"):
        latest_valid(folder)  # not None, which would mean to start from scratch
    os.mkfifo(folder / "update-00000010")
    put(folder, 1)
    found = latest_valid(folder)
    assert found is not None
    assert dict(found.skipped) == {
        "update-00000009": "is a link, which is not allowed in a checkpoint folder",
        "update-00000010": "is a pipe, which is not allowed in a checkpoint folder",
    }
    assert chosen(folder) == 1


def forged(path: Path, **changes: Any) -> None:
    """Change a manifest and recompute its hash."""
    body = json.loads((path / "manifest.json").read_text())
    body = {name: value for name, value in {**body, **changes}.items() if name != "sha256" and value is not None}
    (path / "manifest.json").write_text(json.dumps(body | {"sha256": compute_manifest_digest(body)}))


FACTS = {"size": 1, "sha256": "0"}


def piece(*pieces: list[Any], shape: tuple[int, ...] = (3,)) -> dict[str, Any]:
    return {"w": {"dtype": "float32", "shape": list(shape), "pieces": list(pieces), "aliases": []}}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../update-00000001/model.safetensors": FACTS}},
        {"files": {"/etc/passwd": FACTS}},
        {"files": {".hidden": FACTS}},
        {"files": {"a\0b": FACTS}},
        {"files": {"manifest.json": FACTS}},
        {"files": {"model.safetensors": {"size": 1}}},
        {"files": []},
        {"tensors": piece(["../../secret", "w", 0, 3])},
        {"tensors": piece(["model.safetensors", "w", 0, 2])},
        {"tensors": piece(["model.safetensors", "w", 1, 3])},
        {"tensors": piece(["model.safetensors", "w", 0, 2], ["model.safetensors", "v", 1, 3])},
        {"tensors": piece()},
        {"tensors": {"w": None}},
        {"position": None},
        {"format": 2},
        {"more": 1},
    ],
)
def test_a_manifest_that_says_nonsense_is_damage_never_obeyed(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    path = put(tmp_path, 1).path
    forged(path)
    assert chosen(tmp_path) == 1
    forged(path, **changes)
    with pytest.raises(UsageError, match=r"^all checkpoints in .* are damaged"):
        latest_valid(tmp_path)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"sha256": 1}', "[" * 100_000, "\xff\xfe"])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, text: str) -> None:
    path = put(tmp_path, 1).path
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"^all checkpoints in .* are damaged"):
        latest_valid(tmp_path)


def test_a_file_that_is_not_what_the_manifest_says_is_not_used(tmp_path: Path) -> None:
    path = put(tmp_path, 1).path
    body = json.loads((path / "manifest.json").read_text())
    body["tensors"]["conv.bias"]["dtype"] = "int32"
    forged(path, tensors=body["tensors"])
    with pytest.raises(CorruptCheckpointError, match=r"conv\.bias in model\.safetensors does not match the manifest"):
        load_checkpoint(open_checkpoint(path)).model["conv.bias"]


def test_all_damaged_is_an_error_never_a_start_from_scratch(tmp_path: Path) -> None:
    for update in (1, 2):
        os.truncate(put(tmp_path, update).path / "model.safetensors", 5)
    with pytest.raises(UsageError) as error:
        latest_valid(tmp_path)
    line = str(error.value)
    assert "\n" not in line
    assert f"all checkpoints in {tmp_path} are damaged (update-00000002: model.safetensors has 5 bytes" in line
    assert line.endswith("type resume=never to start a new run beside this one")


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "missing") is None
    assert latest_valid(tmp_path) is None
    (tmp_path / "tmp-update-00000001-77").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_valid(tmp_path) is None


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UsageError, match=r"checkpoint\.dir=.* is not a folder"):
        latest_valid(tmp_path / "checkpoints")


# --- resume=PATH --------------------------------------------------------------------------------------------------


def test_the_checkpoint_that_the_user_names_is_opened(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    assert open_checkpoint(str(tmp_path / "update-00000001")).manifest.position["update"] == 1


def test_what_is_no_checkpoint_is_refused_with_the_mend(tmp_path: Path) -> None:
    newest_path = put(tmp_path / "checkpoints", 3).path
    with pytest.raises(UsageError, match=r"^resume=alway is not a checkpoint: type auto, never, must, or a folder"):
        open_checkpoint("alway")
    for around in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UsageError, match=re.escape(f"e.g. resume={newest_path}")):
            open_checkpoint(around)
    os.truncate(newest_path / "model.safetensors", 3)
    with pytest.raises(UsageError, match=r"is damaged: model\.safetensors has 3 bytes .*; choose another checkpoint"):
        open_checkpoint(newest_path)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    manifest = open_checkpoint(put(tmp_path, 1).path).manifest
    check_tensor_names(manifest, tensors())
    wrong = {"conv.weight": torch.ones(4, 4), "conv.bias": torch.ones(3).double(), "fc.weight": torch.ones(1)}
    with pytest.raises(UsageError) as error:
        check_tensor_names(manifest, wrong)
    assert "conv.weight is float32[4, 3] in the checkpoint, not float32[4, 4]" in str(error.value)
    assert "conv.bias is float32[3] in the checkpoint, not float64[3]" in str(error.value)
    assert "fc.weight is not in the checkpoint" in str(error.value)
    with pytest.raises(UsageError, match=r"conv\.bias is only in the checkpoint"):
        check_tensor_names(manifest, {"conv.weight": torch.ones(4, 3)})
    many = {**tensors(), **{f"more{i}": torch.ones(1) for i in range(9)}}
    with pytest.raises(UsageError, match=r"more4 is not in the checkpoint and 4 more: use the recipe"):
        check_tensor_names(manifest, many)


# --- pruning, and the newest checkpoint ---------------------------------------------------------------------------


def test_the_newest_are_kept_and_the_protected(tmp_path: Path) -> None:
    for update in range(1, 7):
        put(tmp_path, update, keep=2, protect=frozenset({"update-00000002"}))
    assert updates(tmp_path) == [2, 5, 6]
    put(tmp_path, 7, keep=1)
    assert updates(tmp_path) == [7]


def test_who_went_back_goes_on_from_there(tmp_path: Path) -> None:
    """resume=PATH to update 10 when 20 exists: a restart continues from 11, not from the abandoned 20."""
    for update in (10, 20, 11):
        put(tmp_path, update, keep=2)
    assert chosen(tmp_path) == 11
    assert [path.name for path in newest_first(tmp_path)] == ["update-00000011", "update-00000020"]
    put(tmp_path, 12, keep=2)
    assert updates(tmp_path) == [11, 12]


def test_a_damaged_checkpoint_is_not_counted_as_kept(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (put(tmp_path, 2).path / "manifest.json").unlink()
    put(tmp_path, 3, keep=2)
    assert updates(tmp_path) == [1, 2, 3]
    put(tmp_path, 4, keep=2)
    assert updates(tmp_path) == [3, 4]


def test_a_damaged_one_that_is_older_is_no_news(tmp_path: Path) -> None:
    (put(tmp_path, 1).path / "manifest.json").unlink()
    put(tmp_path, 2)
    found = latest_valid(tmp_path)
    assert found is not None
    assert found.skipped == ()


def test_the_same_update_may_be_saved_again(tmp_path: Path) -> None:
    os.truncate(put(tmp_path, 5).path / "model.safetensors", 3)
    put(tmp_path, 5, keep=1)
    assert chosen(tmp_path) == 5
    assert updates(tmp_path) == [5]


def test_a_copied_checkpoint_loads_where_it_is(tmp_path: Path) -> None:
    shutil.copytree(put(tmp_path / "one", 4).path, tmp_path / "two" / "update-00000004")
    assert chosen(tmp_path / "two") == 4


def test_a_name_does_not_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../out", "tmp-1", ".hidden", "", "a/b", "a\n"):
        with pytest.raises(ValueError, match="not a valid checkpoint name"):
            save_checkpoint(tmp_path / "in", name, state(), SaveOptions(1))
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

PUBLISHER = """
import os, shutil, sys
from pathlib import Path
from launcher.checkpoint.manifest import Manifest, atomic_directory, find_next_sequence, prune
folder, update, module, count = Path(sys.argv[1]), int(sys.argv[2]), {"rename": os, "rmtree": shutil}[sys.argv[3]], 0
real = getattr(module, sys.argv[3])
def dying(*args, **options):
    global count
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), 9)
    return real(*args, **options)
setattr(module, sys.argv[3], dying)
with atomic_directory(folder, f"update-{update:08d}", lambda phase: None) as fresh:
    text = Manifest({}, {}, {"update": update}, {}, 1, {}, {}, find_next_sequence(folder)).to_json()
    (fresh / "manifest.json").write_text(text)
prune(folder, 1)
"""


def status_of(script: str, *args: object) -> int:
    argv = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(argv, timeout=120, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "count"), [("checkpoint-write", 1), ("checkpoint-write", 2), ("checkpoint-rename", 1)]
)
def test_killed_while_saving_the_newest_complete_one_loads(tmp_path: Path, phase: str, count: int) -> None:
    put(tmp_path, 1)
    assert status_of(WRITER, tmp_path, phase, count) == -signal.SIGKILL
    assert [name for name in names(tmp_path) if name.startswith("tmp")], "it was killed on the way"
    assert chosen(tmp_path) == 1
    put(tmp_path, 3)
    assert updates(tmp_path) == [1, 3], "the next save removes what the dead writer left"


@pytest.mark.parametrize(("step", "count"), [("rename", 1), ("rename", 2), ("rename", 3), ("rmtree", 1)])
@pytest.mark.parametrize("update", [1, 2])
def test_killed_between_any_two_steps_of_publishing(tmp_path: Path, update: int, step: str, count: int) -> None:
    """One checkpoint is kept: the same update is saved again, or the next one is saved and the old one pruned."""
    put(tmp_path, 1)
    dies = (update, step, count) != (2, "rename", 3)  # another update takes two renames, the same update three
    assert status_of(PUBLISHER, tmp_path, update, step, count) == (-signal.SIGKILL if dies else 0)
    found = latest_valid(tmp_path)
    assert found is not None
    assert found.manifest.position["update"] in (1, update)
    assert found.skipped == ()
    put(tmp_path, 3, keep=1)
    assert updates(tmp_path) == [3]


@pytest.mark.parametrize("phase", ["checkpoint-write", "checkpoint-rename"])
def test_a_full_disk_is_one_clear_error_and_costs_nothing(tmp_path: Path, phase: str) -> None:
    put(tmp_path, 1, keep=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError) as error:
        put(tmp_path, 2, keep=1, inject_fault=at(phase, raising(full)))
    assert str(error.value) == f"checkpoint update-00000002 could not be written to {tmp_path}: the disk is full"
    assert updates(tmp_path) == [1]
    assert chosen(tmp_path) == 1


def test_a_limit_of_the_system_is_one_clear_error_too(tmp_path: Path) -> None:
    put(tmp_path, 1)
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
    assert updates(tmp_path) == [1]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_any_other_failure_leaves_no_trace(tmp_path: Path, error: BaseException) -> None:
    put(tmp_path, 1)
    with pytest.raises(type(error)):
        put(tmp_path, 2, inject_fault=at("checkpoint-rename", raising(error)))
    assert names(tmp_path) == ["update-00000001"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written to .*: Not a directory"):
        put(tmp_path / "file" / "checkpoints", 1)


def test_everything_is_on_the_disk_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
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
    put(tmp_path, 2, keep=1)
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


def test_time_is_taken_from_the_clock_given(tmp_path: Path) -> None:
    clock = iter([10.0, 12.5])
    assert put(tmp_path, 1, clock=lambda: next(clock)).seconds == 2.5


# --- the final parameters -----------------------------------------------------------------------------------------


def stored(folder: Path, model: Mapping[str, torch.Tensor]) -> LazyTensors:
    """Return the tensors of a model as stored in a checkpoint."""
    saved = CheckpointState(model, {}, {"samples": 1, "update": 1}, {}, 1, {})
    return load_checkpoint(open_checkpoint(save_checkpoint(folder, "update-1", saved, SaveOptions(1)).path)).model


def test_the_final_model_loads_without_this_program(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    del model.part, other.part  # load_model itself does not support views
    export_safetensors(tmp_path / "model.safetensors", stored(tmp_path / "from", model.state_dict()))
    missing, unexpected = safetensors.torch.load_model(other, tmp_path / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert torch.equal(other.head.weight, model.embed.weight)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


def test_it_holds_what_the_librarys_own_file_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 2).double(), nn.Linear(3, 3).bfloat16())
    export_safetensors(tmp_path / "ours", stored(tmp_path / "from", model.state_dict()))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_every_tensor_lies_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    """Data is aligned, so that a reader can map the file in place, for any length of the header."""
    for length in range(1, 9):
        model = {"a" * length: torch.ones(3, dtype=torch.uint8), "b": torch.ones(1).double(), "c": torch.ones(1)}
        export_safetensors(tmp_path / "model.safetensors", stored(tmp_path / str(length), model))
        raw = (tmp_path / "model.safetensors").read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        for name, tensor in model.items():
            assert (begin + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_the_old_model_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    old, new = (stored(tmp_path / name, tensors(value)) for name, value in (("old", 1.0), ("new", 2.0)))
    export_safetensors(path, old)
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda number: raising(full)())
        with pytest.raises(CheckpointError, match=r"model\.safetensors could not be written to .*: the disk is full"):
            export_safetensors(path, new)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.safetensors", "new", "old"]
    export_safetensors(path, new)
    assert torch.equal(safetensors.torch.load_file(path)["conv.weight"], tensors(2.0)["conv.weight"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_choosing_a_checkpoint_needs_no_torch() -> None:
    script = "import sys, launcher.checkpoint.manifest; assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
