"""What the commands share: resolving the configuration."""

from __future__ import annotations

import gc

import pytest

from launcher.cli.arguments import resolve_config
from launcher.config import compose  # noqa: F401  # as a process that has resolved a configuration before
from launcher.system import garbage_collection


def test_objects_that_exist_when_a_configuration_is_resolved_again_are_collected_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage_collection, "_owned", True)
    before = gc.get_freeze_count()
    resolve_config(["recipe=mlp"])
    assert gc.get_freeze_count() <= before
