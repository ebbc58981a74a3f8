"""Rendezvous: connect the ranks through a store, exchange their first messages, and form the process group."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

# Its functions have the default group as a default argument. DDP imports it, and if the group is then there already, it
# would never be freed: its connections would stay open when the rank leaves it, and others might wait for this one.
import torch.distributed.nn.functional

from launcher.topology import Topology, get_master_port

__all__ = [
    "broadcast_text",
    "connect_store",
    "gather_to_rank0",
    "init_process_group",
    "make_loopback_store",
    "make_sub_store",
]

STORE_POLL_S = 0.01
STORE_POLL_PER_RANK_S = 20e-6  # each poll asks for a key of every rank


def open_loopback_socket(port: int = 0) -> socket.socket:
    """Open a listening socket that only this machine can reach."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    listening.listen(4096)
    return listening


def make_loopback_store(port: int, *, serve: bool, world: int | None = None, timeout_s: float = 600.0) -> dist.TCPStore:
    """A TCPStore that listens on 127.0.0.1 only; torch's own listens on all interfaces. Port 0 picks a free port."""
    listening = open_loopback_socket(port) if serve else None
    if listening is not None:
        port = listening.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        world_size=world,
        is_master=serve,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach() if listening is not None else None,
    )


def connect_store(topology: Topology, *, loopback: bool, timeout_s: float) -> dist.Store:
    """Connect to the job's store: torchrun's, as its environment variables name it, or our own on the loopback."""
    if not loopback:
        return next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))[0]
    return make_loopback_store(get_master_port(), serve=topology.rank == 0, world=topology.world, timeout_s=timeout_s)


def gather_to_rank0(
    store: dist.Store, topology: Topology, message: str, timeout_s: float
) -> tuple[list[str], dist.Store]:
    """Gather every rank's `message` on rank 0; also return a section of the store that is still unused.

    A torchrun that shares its store with the workers keeps what earlier generations wrote. So each rank writes a hello
    with a random token and waits for the answer to this token, which rank 0 gives to every hello that it finds.
    """
    token = os.urandom(8).hex()
    if topology.rank == 0:
        return [message, *answer_hellos(store, topology.world, token, timeout_s)], dist.PrefixStore(token, store)
    store.set(f"hello/{topology.rank}", token)
    try:
        store.wait([f"answer/{token}"], timedelta(seconds=timeout_s))
    except dist.DistStoreError as problem:
        raise TimeoutError(f"rank 0 did not answer within launch.timeout_s={timeout_s:g}") from problem
    section = store.get(f"answer/{token}").decode()
    store.set(f"{section}/{topology.rank}", message)
    return [], dist.PrefixStore(section, store)


def answer_hellos(store: dist.Store, world: int, token: str, timeout_s: float) -> list[str]:
    """Answer every hello, including those that change meanwhile, until all other ranks have sent their message.

    A fixed number of requests, each for all ranks at once, unless a hello is of an earlier generation.
    """
    hellos, messages = ([f"{prefix}/{rank}" for rank in range(1, world)] for prefix in ("hello", token))
    answered: set[bytes] = set()
    deadline_s = time.monotonic() + timeout_s
    wait_for_keys(store, hellos, timeout_s)
    while not store.check(messages):
        new = [hello for hello in store.multi_get(hellos) if hello not in answered]
        store.multi_set([f"answer/{hello.decode()}" for hello in new], [token] * len(new))  # type: ignore[attr-defined]
        answered.update(new)
        if time.monotonic() > deadline_s:
            raise_not_connected(store, messages, timeout_s)
        time.sleep(max(STORE_POLL_S, STORE_POLL_PER_RANK_S * world))
    return [text.decode() for text in store.multi_get(messages)] if messages else []


def wait_for_keys(store: dist.Store, keys: list[str], timeout_s: float) -> None:
    if not keys:
        return
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except dist.DistStoreError:
        raise_not_connected(store, keys, timeout_s)


def raise_not_connected(store: dist.Store, keys: list[str], timeout_s: float) -> NoReturn:
    missing = [rank for rank, key in enumerate(keys, start=1) if not store.check([key])]
    raise TimeoutError(f"ranks {missing} did not connect within launch.timeout_s={timeout_s:g}")


def broadcast_text(store: dist.Store, text: str | None) -> str:
    """Broadcast rank 0's `text` through the store; the other ranks pass None."""
    if text is not None:
        store.set("text", text)
    return store.get("text").decode()


def make_sub_store(store: dist.Store, name: str) -> dist.Store:
    """The section `name` of the store."""
    return dist.PrefixStore(name, store)


def init_process_group(
    store: dist.Store, topology: Topology, device: torch.device, backend: str, timeout_s: float
) -> str:
    """Initialise the process group and return the name of its backend."""
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=topology.rank, world_size=topology.world, timeout=timedelta(seconds=timeout_s)
    )
    return backend
