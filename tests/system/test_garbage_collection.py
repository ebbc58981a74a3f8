"""Imports run without garbage collection; after them it is as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from launcher.system.garbage_collection import paused_garbage_collection


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
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
