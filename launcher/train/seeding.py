"""Seed the global random generators from addresses of draws, and find out which of them are drawn from."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import numpy
import torch

__all__ = [
    "COLLATE_STREAM",
    "DATASET_STREAM",
    "GLOBAL_GENERATORS",
    "LOSS_CHECK_STREAM",
    "MODEL_STREAM",
    "VALIDATION_STREAM",
    "GeneratorWatch",
    "GlobalGenerator",
    "UsedGenerators",
    "derive_seed",
    "seed_host_generators",
]

#: First numbers of the addresses of random draws other than those of a sample or a training micro-batch.
MODEL_STREAM, COLLATE_STREAM, DATASET_STREAM, VALIDATION_STREAM, LOSS_CHECK_STREAM = -1, -2, -3, -4, -5


def derive_seed(*numbers: int) -> int:
    """Derive a seed from all the numbers: random state is a function of the position, never carried over."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_numpy(seed: int) -> None:
    numpy.random.seed(seed & 0xFFFFFFFF)


def seed_host_generators(seed: int) -> None:
    """Seed the global generators of random, numpy and torch (the CPU's): about 8 µs.

    A pass that cannot be repeated, as a forward pass, needs all of them, since it is not known what it will draw from.
    """
    random.seed(seed)
    seed_numpy(seed)
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class GlobalGenerator:
    """A global generator of random numbers: `seed` seeds it, `draw` draws one number of 53 bits or more.

    `readers` are functions, as (module, name), that read its state and its seed. What is computed from these depends
    on the generator too, although its state is the same afterwards.
    """

    name: str
    seed: Callable[[int], Any]
    draw: Callable[[], Any]
    readers: tuple[tuple[ModuleType, str], ...]


_DRAWN = torch.empty((), dtype=torch.int64, device="cpu")

GLOBAL_GENERATORS = (
    GlobalGenerator("random", random.seed, lambda: random.getrandbits(64), ((random, "getstate"),)),
    GlobalGenerator("numpy", seed_numpy, numpy.random.random_sample, ((numpy.random, "get_state"),)),
    GlobalGenerator(
        "torch",
        torch.default_generator.manual_seed,
        lambda: _DRAWN.random_().item(),
        tuple((module, name) for module in (torch, torch.random) for name in ("get_rng_state", "initial_seed")),
    ),
)
_WATCH_SEED = 0x5EEDED_BA7C4  # of generators that are expected not to be used


def note_calls(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    """The same function, which calls `note` first."""

    @wraps(function)
    def note_and_call(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return note_and_call


class GeneratorWatch:
    """Tells whether a global generator is used between `start` and `stop`: drawn from, seeded or read.

    `start` seeds it. If nobody uses it, the next number it draws is the first one after seeding. It costs about 3 µs.
    """

    def __init__(self, generator: GlobalGenerator) -> None:
        self.generator = generator
        self._seed = _WATCH_SEED
        self._first: tuple[int, Any] | None = None  # a seed, and the first number after it
        self._was_read = False
        readers = [(vars(module), name) for module, name in generator.readers]
        self._readers = [(names, name, names[name], note_calls(names[name], self._note)) for names, name in readers]

    def start(self, seed: int = _WATCH_SEED) -> None:
        self._seed, self._was_read = seed, False
        self.generator.seed(seed)
        for names, name, _, noted in self._readers:
            names[name] = noted

    def stop(self) -> bool:
        """Return whether the generator was used; its state is any afterwards."""
        for names, name, original, _ in self._readers:
            names[name] = original
        drawn = self.generator.draw()
        if self._first is None or self._first[0] != self._seed:
            self.generator.seed(self._seed)
            self._first = self._seed, self.generator.draw()
        return self._was_read or drawn != self._first[1]

    def _note(self) -> None:
        self._was_read = True


class UsedGenerators:
    """The global generators that have been used so far, and watches on the others."""

    def __init__(self) -> None:
        self.used: tuple[GlobalGenerator, ...] = ()
        self._watches = [GeneratorWatch(generator) for generator in GLOBAL_GENERATORS]

    def seed(self, seed: int) -> None:
        """Seed those that have been used."""
        for generator in self.used:
            generator.seed(seed)

    @contextmanager
    def watch(self, seed: int = _WATCH_SEED) -> Iterator[list[GlobalGenerator]]:
        """Seed the unused generators and watch them; those used meanwhile are in the list at the end, and in `used`."""
        found: list[GlobalGenerator] = []
        for watch in self._watches:
            watch.start(seed)
        try:
            yield found
        finally:
            stopped = [(watch, watch.stop()) for watch in self._watches]
            found += [watch.generator for watch, was_used in stopped if was_used]
            self.used += tuple(found)
            self._watches = [watch for watch, was_used in stopped if not was_used]
