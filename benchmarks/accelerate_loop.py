"""The same training with Hugging Face accelerate, as its documentation writes the loop: a second thing to compare with.

torchrun --nproc-per-node=2 benchmarks/accelerate_loop.py --updates 300
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from overhead_workload import CLASSES_BY_NAME, make_workload
from torch.utils.data import DataLoader


def main() -> None:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="perceptron", choices=sorted(CLASSES_BY_NAME))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    parser.add_argument("--per-device", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--updates", type=int, default=300)
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=options.accumulation, cpu=not torch.cuda.is_available())
    if accelerator.num_processes != int(os.environ["WORLD_SIZE"]):
        sys.exit(f"accelerate trains {accelerator.num_processes} processes that know nothing of each other")
    set_seed(0)
    recipe = make_workload(options.recipe, options.set)
    model = recipe.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    data = recipe.dataset("train")
    collate = (lambda batch: batch) if hasattr(data, "__getitems__") else None
    batches = DataLoader(data, options.per_device, shuffle=True, drop_last=True, collate_fn=collate)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    micro_batches = 0
    while micro_batches < options.updates * options.accumulation:
        for batch in batches:
            with accelerator.accumulate(model):
                total, count = recipe.compute_sums(model, batch)
                accelerator.backward(total / count)
                optimizer.step()
                optimizer.zero_grad()
            micro_batches += 1
            if micro_batches == options.updates * options.accumulation:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
