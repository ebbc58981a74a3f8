"""Atomic writes: a file is replaced completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.system.atomic_files import atomic_write_text, make_durable_dir


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            atomic_write_text(path, "new and longer")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    atomic_write_text(path, "new")
    assert path.read_text() == "new"


def test_stale_temporary_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / f".tmp-file-{os.getpid()}").write_text("half")
    atomic_write_text(tmp_path / "file", "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_full_device_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(os, "open", lambda *_: full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(tmp_path / "file", "x")


def test_durable_dir_may_already_exist(tmp_path: Path) -> None:
    make_durable_dir(tmp_path / "a" / "b")
    make_durable_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
