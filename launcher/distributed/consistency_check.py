"""Before training, the ranks compare their setups: an error or a difference on any rank is raised on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.errors import UsageError
from launcher.topology import Topology

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["check_ranks_agree", "first_mismatch"]

SetupT = TypeVar("SetupT")


def check_ranks_agree(
    store: dist.Store, topology: Topology, make: Callable[[], SetupT], facts: Callable[[SetupT], Mapping[str, Any]]
) -> SetupT:
    """Call `make` on this rank and return its result once all ranks have succeeded with equal `facts`.

    Raises:
        UsageError: on every rank, with the error of the first rank that failed, or the first difference.
    """
    word: dict[str, Any]
    try:
        ready = make()
        word = {"facts": dict(facts(ready))}
    except UsageError as error:
        word = {"error": str(error)}
    if topology.world > 1:
        store.set(f"hello/{topology.rank}", json.dumps(word))
    if topology.rank == 0:
        others = [json.loads(store.get(f"hello/{rank}")) for rank in range(1, topology.world)]
        store.set("verdict", first_mismatch([word, *others]))
    if refused := store.get("verdict").decode():
        raise UsageError(refused)
    return ready


def first_mismatch(words: Sequence[Mapping[str, Any]]) -> str:
    """The first error or difference in the ranks' reports; an empty string if there is none."""
    for rank, word in enumerate(words):
        if "error" in word:
            return str(word["error"]) if rank == 0 else f"{word['error']} (rank {rank})"
    for rank, word in enumerate(words):
        for name, value in words[0]["facts"].items():
            if word["facts"].get(name) != value:
                return (
                    f"the ranks disagree: {name} is {word['facts'].get(name)} on rank {rank} and {value} on rank 0: "
                    f"give every node the same program, data and folder"
                )
    return ""
