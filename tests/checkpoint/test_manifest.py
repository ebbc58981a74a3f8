"""Choosing a checkpoint: damage is detected, the newest valid one is found, old ones are pruned, none is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.manifest import (
    Manifest,
    latest_valid,
    newest_first,
    open_checkpoint,
)
from launcher.errors import UsageError
from tests.helpers.checkpoints import (
    FILES,
    list_updates,
    load_latest_update,
    rewrite_manifest,
    run_script,
    save_update,
)

# --- corrupt checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_detected_anywhere(tmp_path: Path, name: str) -> None:
    save_update(tmp_path, 1)
    path = save_update(tmp_path, 2).path / name
    whole = path.read_bytes()
    for offset in range(0, len(whole), max(1, len(whole) // 60)):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        found = latest_valid(tmp_path)
        assert found is not None
        if found.path.name == "update-00000002":  # a space in the manifest's layout: its content is the same
            assert name == "manifest.json"
            assert json.loads(flipped) == json.loads(whole)
        else:
            assert [checkpoint_name for checkpoint_name, _ in found.skipped] == ["update-00000002"]
            assert load_latest_update(tmp_path) == 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut short", "empty", "longer", "missing"])
def test_file_of_wrong_size_is_detected(tmp_path: Path, name: str, damage: str) -> None:
    save_update(tmp_path, 1)
    path = save_update(tmp_path, 2).path / name
    if damage == "missing":
        path.unlink()
    else:
        size = path.stat().st_size
        os.truncate(path, {"cut short": size - 1, "empty": 0, "longer": size + 8}[damage])
    found = latest_valid(tmp_path)
    assert found is not None
    ((checkpoint_name, why),) = found.skipped
    assert checkpoint_name == "update-00000002"
    assert name in why or "manifest" in why
    assert load_latest_update(tmp_path) == 1


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "link in place of a file"])
def test_only_regular_files_are_allowed_in_checkpoint(tmp_path: Path, kind: str) -> None:
    save_update(tmp_path, 1)
    path = save_update(tmp_path, 2).path
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
    assert load_latest_update(tmp_path) == 1


def test_link_or_pipe_among_checkpoints_is_refused(tmp_path: Path) -> None:
    save_update(tmp_path / "elsewhere", 9)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "update-00000009").symlink_to(tmp_path / "elsewhere" / "update-00000009")
    with pytest.raises(UsageError, match="update-00000009: is a link, which is not allowed in a checkpoint folder"):
        latest_valid(folder)  # not None, which would mean to start from scratch
    os.mkfifo(folder / "update-00000010")
    save_update(folder, 1)
    found = latest_valid(folder)
    assert found is not None
    assert dict(found.skipped) == {
        "update-00000009": "is a link, which is not allowed in a checkpoint folder",
        "update-00000010": "is a pipe, which is not allowed in a checkpoint folder",
    }
    assert load_latest_update(folder) == 1


FACTS = {"size": 1, "sha256": "0"}


def describe_pieces(*pieces: list[Any], shape: tuple[int, ...] = (3,)) -> dict[str, Any]:
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
        {"tensors": describe_pieces(["../../secret", "w", 0, 3])},
        {"tensors": describe_pieces(["model.safetensors", "w", 0, 2])},
        {"tensors": describe_pieces(["model.safetensors", "w", 1, 3])},
        {"tensors": describe_pieces(["model.safetensors", "w", 0, 2], ["model.safetensors", "v", 1, 3])},
        {"tensors": describe_pieces()},
        {"tensors": {"w": None}},
        {"position": None},
        {"format": 2},
        {"more": 1},
    ],
)
def test_invalid_manifest_content_counts_as_damage(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    path = save_update(tmp_path, 1).path
    rewrite_manifest(path)
    assert load_latest_update(tmp_path) == 1
    rewrite_manifest(path, **changes)
    with pytest.raises(UsageError, match=r"^all checkpoints in .* are damaged"):
        latest_valid(tmp_path)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"sha256": 1}', "[" * 100_000, "\xff\xfe"])
def test_unparsable_manifest_counts_as_damage(tmp_path: Path, text: str) -> None:
    path = save_update(tmp_path, 1).path
    (path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"^all checkpoints in .* are damaged"):
        latest_valid(tmp_path)


def test_all_checkpoints_damaged_raises_error(tmp_path: Path) -> None:
    for update in (1, 2):
        os.truncate(save_update(tmp_path, update).path / "model.safetensors", 5)
    with pytest.raises(UsageError) as error:
        latest_valid(tmp_path)
    line = str(error.value)
    assert "\n" not in line
    assert f"all checkpoints in {tmp_path} are damaged (update-00000002: model.safetensors has 5 bytes" in line
    assert line.endswith("type resume=never to start a new run beside this one")


def test_missing_checkpoints_return_none(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "missing") is None
    assert latest_valid(tmp_path) is None
    (tmp_path / "tmp-update-00000001-77").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest_valid(tmp_path) is None


def test_file_instead_of_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UsageError, match=r"checkpoint\.dir=.* is not a folder"):
        latest_valid(tmp_path / "checkpoints")


# --- resume=PATH --------------------------------------------------------------------------------------------------


def test_open_checkpoint_opens_the_named_path(tmp_path: Path) -> None:
    save_update(tmp_path, 1)
    save_update(tmp_path, 2)
    assert open_checkpoint(str(tmp_path / "update-00000001")).manifest.position["update"] == 1


def test_open_checkpoint_refuses_other_paths_with_fix(tmp_path: Path) -> None:
    newest_path = save_update(tmp_path / "checkpoints", 3).path
    with pytest.raises(UsageError, match=r"^resume=alway is not a checkpoint: type auto, never, must, or a folder"):
        open_checkpoint("alway")
    for around in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UsageError, match=re.escape(f"e.g. resume={newest_path}")):
            open_checkpoint(around)
    os.truncate(newest_path / "model.safetensors", 3)
    with pytest.raises(UsageError, match=r"is damaged: model\.safetensors has 3 bytes .*; choose another checkpoint"):
        open_checkpoint(newest_path)


def test_manifest_has_one_line_per_file_and_tensor_whatever_the_number_of_pieces() -> None:
    files = {f"model-{rank}.safetensors": {"size": 4, "sha256": "ä"} for rank in range(50)}
    pieces = [[name, "weight", number, number + 1] for number, name in enumerate(files)]
    tensors = {f"layer.{number}": {"dtype": "float32", "shape": [50], "pieces": pieces} for number in range(3)}
    for manifest in (
        Manifest(files, tensors, {"update": 1}, {"shares": [1] * 50}, 50, {"torch": "2"}, {"a": {}}, 7),
        Manifest({}, {}, {}, {}, 1, {}),
    ):
        text = manifest.to_json()
        assert Manifest.from_json(text) == manifest
        assert len(text.splitlines()) <= len(manifest.files) + len(manifest.tensors) + 14


# --- pruning, and the newest checkpoint ---------------------------------------------------------------------------


def test_prune_keeps_newest_and_protected_checkpoints(tmp_path: Path) -> None:
    for update in range(1, 7):
        save_update(tmp_path, update, keep=2, protect=frozenset({"update-00000002"}))
    assert list_updates(tmp_path) == [2, 5, 6]
    save_update(tmp_path, 7, keep=1)
    assert list_updates(tmp_path) == [7]


def test_restart_after_rollback_continues_the_newer_branch(tmp_path: Path) -> None:
    """resume=PATH to update 10 when 20 exists: a restart continues from 11, not from the abandoned 20."""
    for update in (10, 20, 11):
        save_update(tmp_path, update, keep=2)
    assert load_latest_update(tmp_path) == 11
    assert [path.name for path in newest_first(tmp_path)] == ["update-00000011", "update-00000020"]
    save_update(tmp_path, 12, keep=2)
    assert list_updates(tmp_path) == [11, 12]


def test_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save_update(tmp_path, 1)
    (save_update(tmp_path, 2).path / "manifest.json").unlink()
    save_update(tmp_path, 3, keep=2)
    assert list_updates(tmp_path) == [1, 2, 3]
    save_update(tmp_path, 4, keep=2)
    assert list_updates(tmp_path) == [3, 4]


def test_older_damaged_checkpoint_is_not_reported(tmp_path: Path) -> None:
    (save_update(tmp_path, 1).path / "manifest.json").unlink()
    save_update(tmp_path, 2)
    found = latest_valid(tmp_path)
    assert found is not None
    assert found.skipped == ()


def test_copied_checkpoint_loads_at_new_path(tmp_path: Path) -> None:
    shutil.copytree(save_update(tmp_path / "one", 4).path, tmp_path / "two" / "update-00000004")
    assert load_latest_update(tmp_path / "two") == 4


# --- kills ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.process
@pytest.mark.parametrize(("step", "count"), [("rename", 1), ("rename", 2), ("rename", 3), ("rmtree", 1)])
@pytest.mark.parametrize("update", [1, 2])
def test_kill_between_any_publishing_steps_is_safe(tmp_path: Path, update: int, step: str, count: int) -> None:
    """One checkpoint is kept: the same update is saved again, or the next one is saved and the old one pruned."""
    save_update(tmp_path, 1)
    dies = (update, step, count) != (2, "rename", 3)  # another update takes two renames, the same update three
    assert run_script(PUBLISHER, tmp_path, update, step, count) == (-signal.SIGKILL if dies else 0)
    found = latest_valid(tmp_path)
    assert found is not None
    assert found.manifest.position["update"] in (1, update)
    assert found.skipped == ()
    save_update(tmp_path, 3, keep=1)
    assert list_updates(tmp_path) == [3]


def test_manifest_module_imports_no_torch() -> None:
    script = (
        "import sys, launcher.checkpoint.manifest; "
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
