"""A carefully hand-written plain training script, the baseline for the launcher.

    torchrun --nproc-per-node=2 benchmarks/plain_ddp.py --recipe resnet --updates 300 --out plain.json
    torchrun --nproc-per-node=2 benchmarks/plain_ddp.py --recipe gpt --strategy fsdp

It uses the model and data of the same recipe and only trains: no telemetry, checkpoints or validation.
"""

from __future__ import annotations

import argparse
import json
import os
import time

STARTED = time.time()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, DistributedSampler  # noqa: E402


def make_recipe(name: str, width: int | None):
    if name == "gpt":
        from launcher.recipes.gpt import Gpt as Recipe
    elif name == "mlp":
        from launcher.recipes.mlp import Mlp as Recipe
    else:
        from launcher.recipes.resnet import ResNet as Recipe
    return Recipe() if width is None else Recipe(width=width)


def wrap_in_ddp(model: torch.nn.Module):
    whole = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    return whole, *make_backward_and_step(model, fused=True)


def wrap_in_fsdp(model: torch.nn.Module):
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "blocks", model):
        if any(True for _ in block.parameters()):
            fully_shard(block)
    fully_shard(model)
    return model, *make_backward_and_step(model, fused=None)


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
    return engine, engine.backward, engine.step


def make_sgd(model: torch.nn.Module, fused: bool | None) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="resnet")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp", "deepspeed"])
    parser.add_argument("--width", type=int)
    parser.add_argument("--per-device", type=int, default=64)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--out", default="")
    parser.add_argument("--starts", default="", help="file to which each start appends when its first update ended")
    options = parser.parse_args()

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    recipe = make_recipe(options.recipe, options.width)
    torch.manual_seed(0)
    model = recipe.model()
    wrap = {"ddp": wrap_in_ddp, "fsdp": wrap_in_fsdp, "deepspeed": wrap_in_deepspeed}[options.strategy]
    wrapped, backward, step = wrap(model)
    data = recipe.dataset("train")
    sampler = DistributedSampler(data)
    batches = DataLoader(data, options.per_device, sampler=sampler, drop_last=True, collate_fn=lambda batch: batch)

    updates, first, start = 0, None, 0.0
    times: list[float] = []
    while updates < options.updates:
        sampler.set_epoch(updates)
        for batch in batches:
            loss = recipe.loss(wrapped, batch)
            backward(loss.total / loss.count)
            step()
            updates += 1
            now = time.perf_counter()
            times.append(now - start)
            start = now
            if first is None:
                first = time.time()
                if rank == 0 and options.starts:
                    with open(options.starts, "a") as file:
                        file.write(f"{first}\n")
            if updates == options.updates:
                break
    if rank == 0 and options.out:
        with open(options.out, "w") as file:
            json.dump({"first_update_at": first, "started_at": STARTED, "update_s": times[options.skip :]}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
