"""Members and services for tests: in this process, or in processes that can be stopped and killed."""

from __future__ import annotations

import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import launcher
from launcher.elastic.client import MembershipClient
from launcher.elastic.membership import MembershipLimits
from launcher.elastic.messages import Round
from launcher.elastic.service import ServiceSettings, ServiceThread
from launcher.system.processes import identify_process

__all__ = ["TOKEN", "WITHIN_S", "MemberProcess", "connect", "form_round", "identify_self", "read_line", "run_service"]

TOKEN = "the token of the job"
WITHIN_S = 60.0
OWN_SLOTS = itertools.count(100)

#: A trainer that only takes part in rounds. It prints its member number, then each round and how its membership ends.
MEMBER = """
import json, os, sys, time
from launcher.elastic.client import MembershipClient
port, token, forks = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "forks"
client = MembershipClient(("127.0.0.1", port), token, node="node", slot=9)
say = lambda **values: print(json.dumps(values), flush=True)
child = os.fork() if forks else None
if child == 0:
    time.sleep(3600)
say(member=client.member, child=child)
updates = 0
while client.state == "joined":
    client.ready(updates, has_state=updates > 0, host="node", port=1)
    round_ = client.wait_for_round()
    if round_:
        say(round=round_.number, world_size=round_.world_size)
        updates = round_.updates + 1
        while client.state == "joined" and not client.change:
            time.sleep(0.01)
say(state=client.state, lease=client.holds_lease)
"""


class MemberProcess:
    """A member in a process of its own, without site-packages."""

    def __init__(self, port: int, *, token: str = TOKEN, forks: bool = False) -> None:
        arguments = [str(port), token, "forks" if forks else "plain"]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", MEMBER, *arguments],
            stdout=subprocess.PIPE,
            cwd=Path(launcher.__file__).parents[1],
        )

    def read(self) -> dict[str, Any]:
        return json.loads(read_line(self._process))  # type: ignore[no-any-return]

    def send_signal(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def read_line(process: subprocess.Popen[bytes]) -> bytes:
    """Return the next line of a process's output, waiting for it no longer than a test may take."""
    lines: queue.Queue[bytes] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    return lines.get(timeout=WITHIN_S)


def identify_self() -> str:
    """This process, as the owner of a service."""
    identity = identify_process(os.getpid())
    assert identity is not None
    return identity


@contextmanager
def run_service(expected: int = 1, *, lost_after_s: float = 30.0, **settings: Any) -> Iterator[ServiceThread]:
    """Run the service in a thread of this process."""
    limits = MembershipLimits(expected, lost_after_s=lost_after_s)
    thread = ServiceThread(ServiceSettings(TOKEN, limits), **settings)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def connect(port: int, token: str = TOKEN, *, slot: int | None = None, **settings: Any) -> MembershipClient:
    """Connect from a slot, or from one that nobody else has."""
    slot = next(OWN_SLOTS) if slot is None else slot
    return MembershipClient(("127.0.0.1", port), token, node="node", slot=slot, **settings)


def form_round(*clients: MembershipClient, updates: int = 0, has_state: bool = True) -> Round:
    """Have these members come to a round, and return it."""
    for client in clients:
        client.ready(updates, has_state=has_state, host="127.0.0.1", port=2000 + client.member)
    rounds = [client.wait_for_round(WITHIN_S) for client in clients]
    assert rounds[0] is not None
    assert rounds == [rounds[0]] * len(rounds)
    return rounds[0]
