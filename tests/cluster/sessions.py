"""Several small trainings one after the other on the same ranks: a process that imports torch once runs them all.

Started by torchrun with a file of command lines, one JSON list of arguments per line. Each is a whole session, with a
process group and a run folder of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from launcher import session
from launcher.config import resolve
from launcher.heart import Still
from launcher.opening import begin, opened
from launcher.signals import Wishes
from launcher.topology import Topology
from launcher.worker import Assignment


def main(lines: Path) -> None:
    topology = Topology.of(os.environ)
    assert topology is not None
    port = int(os.environ["MASTER_PORT"]) + 1
    store = dist.TCPStore("127.0.0.1", port, topology.world, topology.rank == 0)
    for number, line in enumerate(lines.read_text().splitlines()):
        own = dist.PrefixStore(str(number), store)
        if topology.rank == 0:
            own.set("assignment", composed(json.loads(line), topology.world).to_json())
        assignment = Assignment.from_json(own.get("assignment").decode())
        assert session.run(assignment, topology.started(assignment.generation), own, Wishes(), Still()) == 0


def composed(args: list[str], world: int) -> Assignment:
    found = opened(resolve(args).run, world)
    found.folder.create()
    begin(found)
    return Assignment.of(found, loopback=True).started()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
