"""Before training, the ranks compare their setups: an error or a difference on any rank is raised on all ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.errors import UsageError
from launcher.topology import Topology

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["find_first_mismatch", "prepare_and_compare"]

SetupT = TypeVar("SetupT")


def prepare_and_compare(
    store: dist.Store,
    topology: Topology,
    prepare: Callable[[], SetupT],
    collect_facts: Callable[[SetupT], Mapping[str, Any]],
) -> SetupT:
    """Call `prepare` on this rank and return its result once all ranks have succeeded with equal facts.

    Raises:
        UsageError: on every rank, with the error of the first rank that failed, or the first difference.
    """
    report: dict[str, Any]
    try:
        setup = prepare()
        report = {"facts": dict(collect_facts(setup))}
    except UsageError as error:
        report = {"error": str(error)}
    if topology.world > 1:
        store.set(f"hello/{topology.rank}", json.dumps(report))
    if topology.rank == 0:
        keys = [f"hello/{rank}" for rank in range(1, topology.world)]
        others = [json.loads(text) for text in store.multi_get(keys)] if keys else []
        store.set("verdict", find_first_mismatch([report, *others]))
    if mismatch := store.get("verdict").decode():
        raise UsageError(mismatch)
    return setup


def find_first_mismatch(reports: Sequence[Mapping[str, Any]]) -> str:
    """The first error or difference in the ranks' reports; an empty string if there is none."""
    for rank, report in enumerate(reports):
        if "error" in report:
            return str(report["error"]) if rank == 0 else f"{report['error']} (rank {rank})"
    for rank, report in enumerate(reports):
        for name, value in reports[0]["facts"].items():
            if report["facts"].get(name) != value:
                return (
                    f"the ranks disagree: {name} is {report['facts'].get(name)} on rank {rank} and {value} on rank 0: "
                    f"give every node the same program, data and folder"
                )
    return ""
