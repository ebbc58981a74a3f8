"""Measure the memory of a model's state per worker and compare it with `launcher plan plan.memory=true`.

    torchrun --standalone --nproc-per-node=2 benchmarks/memory.py strategy=fsdp

Resident memory is read before the model is built, after an update (parameters and optimizer state) and after a backward
pass (also gradients); the peak while the model is built is reported for the last rank. The batch is one short sample,
so that activations are small in comparison.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys

import psutil
import torch
import torch.distributed as dist

from launcher import recipe as recipes
from launcher.config.compose import resolve
from launcher.plan.memory_model import estimate_memory
from launcher.strategies.model_size import measure_model_size
from launcher.topology import Topology
from launcher.train.build import Datasets, build_components
from launcher.train.data import get_dataset
from launcher.tune.oom import PeakRss

MODEL = ["recipe=gpt", "recipe.layers=6", "recipe.width=512", "recipe.heads=8", "recipe.block=8", "sink=[]"]


def read_resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def main() -> None:
    config, topology = resolve([*MODEL, *sys.argv[1:]]).config, Topology.from_env(os.environ)
    assert topology is not None
    recipe = recipes.build_recipe(config.recipe)
    data = Datasets(get_dataset(recipe, "train", "real"), get_dataset(recipe, "val", "real"))
    items = torch.utils.data.default_collate([data.train[0]])
    dist.init_process_group("gloo")
    layout = f"zero{config.strategy.stage}" if config.strategy.name == "deepspeed" else config.strategy.name
    expected = estimate_memory(measure_model_size(recipe, config), layout, topology.world)
    warm_up()
    before = read_resident_bytes()
    highest = PeakRss()
    highest.clear()
    components = build_components(recipe, config, topology, torch.device("cpu"), data)
    start_peaks = [0.0] * topology.world
    dist.all_gather_object(start_peaks, (highest.read() - before) / 1e6)
    replica = components.replica

    def run_backward() -> None:
        with replica.micro_batch(last=True, is_padding=False, shard=topology.rank):
            replica.backward(replica.compute_loss(recipe.loss, items).total, topology.world)

    for _ in range(2):
        run_backward()
        replica.step(1e-3, None, 1.0, None)
    state = read_resident_bytes() - before
    run_backward()
    gradients = read_resident_bytes() - before - state
    if topology.rank == 0:
        predicted = expected.parameters + expected.optimizer + expected.buffers
        found = {"layout": layout, "world": topology.world, "state_MB": state / 1e6, "predicted_MB": predicted / 1e6}
        found |= {"gradients_MB": gradients / 1e6, "predicted_gradients_MB": expected.gradients / 1e6}
        found["start_peak_last_rank_MB"] = start_peaks[-1]
        found["total_over_predicted"] = (state + gradients) / expected.total
        print(json.dumps({key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}))
    dist.barrier()
    os._exit(0)


def warm_up() -> None:
    """Load what torch allocates at first use, so that it is not counted."""
    layer = torch.nn.Linear(64, 64)
    layer(torch.randn(8, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    dist.all_reduce(torch.ones(1 << 16))


if __name__ == "__main__":
    main()
