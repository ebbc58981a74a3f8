"""A carefully hand-written plain training script, which the launcher is compared with.

    torchrun --nproc-per-node=2 benchmarks/plain_ddp.py --updates 300
    torchrun --nproc-per-node=2 benchmarks/plain_ddp.py --recipe gpt --strategy fsdp --set width=128

It uses the model and data of the same recipe and only trains: no telemetry, checkpoints or validation.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from overhead_workload import CLASSES_BY_NAME, make_workload
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


def wrap_in_ddp(model: torch.nn.Module):
    """Return the wrapped model, a context for the micro-batches before the last, and how to go back and step."""
    whole, no_sync = model, nullcontext
    if dist.get_world_size() > 1:
        whole = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
        no_sync = whole.no_sync
    return whole, no_sync, *make_backward_and_step(model, fused=True)


def wrap_in_fsdp(model: torch.nn.Module):
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "blocks", model):
        if any(True for _ in block.parameters()):
            fully_shard(block)
    fully_shard(model)
    return model, nullcontext, *make_backward_and_step(model, fused=None)


def make_backward_and_step(model: torch.nn.Module, fused: bool | None):
    optimizer = make_sgd(model, fused)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return torch.Tensor.backward, step


def wrap_in_deepspeed(model: torch.nn.Module, stage: int = 2):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needed for inference only, and would be compiled
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make_sgd(model, None), config=config, dist_init_required=False
    )
    return engine, nullcontext, engine.backward, engine.step


def make_sgd(model: torch.nn.Module, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="resnet", choices=sorted(CLASSES_BY_NAME))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp", "deepspeed"])
    parser.add_argument("--per-device", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--starts", default="", help="file to which each start appends when its first update ended")
    options = parser.parse_args()
    if options.accumulation > 1 and options.strategy != "ddp":
        parser.error("--accumulation is for --strategy ddp")
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")
    recipe = make_workload(options.recipe, options.set)
    torch.manual_seed(0)
    wrap = {"ddp": wrap_in_ddp, "fsdp": wrap_in_fsdp, "deepspeed": wrap_in_deepspeed}[options.strategy]
    model, no_sync, backward, step = wrap(recipe.model())
    data = recipe.dataset("train")
    collate = (lambda batch: batch) if hasattr(data, "__getitems__") else None
    sampler = DistributedSampler(data)
    batches = DataLoader(data, options.per_device, sampler=sampler, drop_last=True, collate_fn=collate)

    micro_batches, epoch = 0, 0
    while micro_batches < options.updates * options.accumulation:
        sampler.set_epoch(epoch)
        epoch += 1
        for batch in batches:
            micro_batches += 1
            last = micro_batches % options.accumulation == 0
            with nullcontext() if last else no_sync():
                total, count = recipe.compute_sums(model, batch)
                backward(total / (count * options.accumulation))
            if not last:
                continue
            step()
            if micro_batches == options.accumulation and options.starts and dist.get_rank() == 0:
                with open(options.starts, "a") as file:
                    file.write(f"{time.time()}\n")
            if micro_batches == options.updates * options.accumulation:
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
