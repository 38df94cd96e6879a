"""One step on several devices, for tests/test_gpu.py: `torchrun tests/gpu_ranks.py FILE`. Rank 0 writes gradients.

The device and the group are opened as training opens them: NCCL on CUDA, gloo on the CPU.
"""
import os
import sys
from typing import Dict, Tuple

import torch
import torch.distributed as dist
from small_models import images_of, small_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_zoo.engine import parallel
from moe_zoo.engine.build import open_device
from moe_zoo.engine.config import load_config
from moe_zoo.losses import auxiliary_losses

WAYS = ('ddp', 'fsdp', 'experts')
IMAGES = 8  # of all ranks together, in groups of one


def model_of(way: str) -> nn.Module:
    """On the CPU, in training, without noise; 8 experts."""
    model = small_model('vmoe_vit_s', noise_std=0., group_images=1)
    model.set_aux_loss(True)
    return model.train()


def batch(model: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    return images_of('vmoe_vit_s', model, IMAGES), torch.arange(IMAGES) % 5


def step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    output, routings = model(x)
    sum(auxiliary_losses(routings, target).values(), nn.functional.cross_entropy(output, target)).backward()


def gradients(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Whole, on the CPU; every rank calls it."""
    return {name.removeprefix('module.'): parallel.whole(p.grad).cpu() for name, p in model.named_parameters()}


def main(path: str) -> None:
    asked = os.environ.get('MOE_ZOO_GPU_DEVICE', 'cuda')
    args = load_config({}, {'device': asked})
    device = open_device(args)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    rank, world, found = args.rank, args.world_size, {}
    for way in WAYS:
        model = model_of(way)
        x, target = (part.chunk(world)[rank].to(device) for part in batch(model))
        model.to(device)
        if way == 'experts':
            parallel.parallelize_experts(model, parallel.create_mesh(world, device.type))
        if way == 'fsdp':
            parallel.shard_model(model)
        wrapped = model if way == 'fsdp' else DistributedDataParallel(
            model, device_ids=[device] if device.type == 'cuda' else None)
        step(wrapped, x, target)
        found[way] = gradients(model)
    if rank == 0:
        torch.save({'backend': dist.get_backend(), 'world': world, 'gradients': found}, path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
