"""A --config-dir as a user writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPE_YAML = """\
# @package _global_
defaults:
  - override /schedule: cosine
recipe:
  _target_: tiny.Tiny
  trust: [tiny]
  width: 16
  data: null
lr:
  base: 0.1
  base_batch: 64
train:
  duration: 3ep
"""


def make_config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's --config-dir with a custom recipe, next to an empty current folder."""
    config_dir = tmp_path / "mine"
    (config_dir / "recipe").mkdir(parents=True)
    (config_dir / "recipe" / "tiny.yaml").write_text(RECIPE_YAML)
    current = tmp_path / "here"
    current.mkdir()
    monkeypatch.chdir(current)
    return config_dir
