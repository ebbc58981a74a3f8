"""Errors of loader processes: none is lost, and full shared memory is one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.config.schema import DataConfig
from launcher.errors import UsageError
from launcher.train.data import MicroBatchLoader, make_data_loader
from launcher.train.loader_errors import iter_explaining_errors
from launcher.train.seeded_dataset import SeededDataset
from tests.helpers.namespaces import run_in_namespace

FULL = """
import torch
from launcher.config.schema import DataConfig
from launcher.train.data import make_data_loader
from launcher.train.loader_errors import iter_explaining_errors
from launcher.train.seeded_dataset import SeededDataset
items = [torch.zeros(500_000) for _ in range(4)]
torch.multiprocessing.set_sharing_strategy("{strategy}")
batches = SeededDataset(items, 0, {collate})
loader = make_data_loader(batches, [[(0, [0, 1])], [(0, [2, 3])]], DataConfig(num_workers=1), False)
try:
    for batch in iter_explaining_errors(loader): print("batch")
except ValueError as error: print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
@pytest.mark.parametrize("collate", ["torch.stack", "list"], ids=["stacked", "sent as they are"])
def test_full_shared_memory_is_refused(tmp_path: Path, strategy: str, collate: str) -> None:
    """Tensors that the data set returns as they are, are copied to shared memory when they are sent: torch's thread for
    that only prints its errors, and the rank waited for the batch forever.
    """
    script = FULL.format(strategy=strategy, collate=collate)
    setup = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    refused = run_in_namespace("-m", setup, [sys.executable, "-c", script], Path.cwd())
    assert "batch" not in refused.stdout.split()
    assert "data.num_workers: batches from loader processes pass through /dev/shm, which is too small" in refused.stdout
    assert "(1.05 MB in all, " in refused.stdout


@pytest.mark.timeout(120)
def test_batch_that_cannot_be_sent_is_an_error() -> None:
    def collate(items: Any) -> Any:
        return lambda: items

    batches = SeededDataset([1, 2], 0, collate)
    loader = make_data_loader(batches, [[(0, [0])], [(0, [1])]], DataConfig(num_workers=1), pin=False)
    with pytest.raises(Exception, match=r"(?s)in a loader process that sends a batch.*[Pp]ickle.*lambda"):
        next(iter_explaining_errors(loader))


def test_unreadable_sample_keeps_its_message() -> None:
    prefix = "Caught UsageError in DataLoader worker process 0.\nOriginal Traceback:\nlauncher.errors.UsageError: "

    def fail() -> Iterator[Any]:
        raise UsageError(f"{prefix}sample 3 cannot be read: torn")
        yield

    for read in (lambda: next(iter_explaining_errors(fail())), MicroBatchLoader(fail()).next_batch):
        with pytest.raises(UsageError, match=r"^sample 3 cannot be read: torn$"):
            read()


def test_end_of_a_loader_ends_the_iteration() -> None:
    assert [int(batch) for batch in iter_explaining_errors(torch.arange(3))] == [0, 1, 2]
    with pytest.raises(StopIteration):
        MicroBatchLoader(iter([])).next_batch()
