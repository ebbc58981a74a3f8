"""Imports run without garbage collection; after them it is as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from launcher.system import garbage_collection
from launcher.system.garbage_collection import own_this_process, paused_garbage_collection


@pytest.fixture(autouse=True)
def owned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(garbage_collection, "_owned", False)
    own_this_process()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_in_the_block_and_its_objects_are_not_looked_at_later() -> None:
    before = gc.get_freeze_count()
    with paused_garbage_collection():
        assert not gc.isenabled()
        kept = [[number] for number in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() - before > len(kept)


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(ImportError), paused_garbage_collection():
        raise ImportError
    assert gc.isenabled()


def test_collection_that_the_user_has_disabled_stays_disabled() -> None:
    gc.disable()
    before = gc.get_freeze_count()
    with paused_garbage_collection():
        pass
    assert not gc.isenabled()
    assert gc.get_freeze_count() == before


def test_nothing_changes_in_a_process_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage_collection, "_owned", False)
    before = gc.get_freeze_count()
    with paused_garbage_collection():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
