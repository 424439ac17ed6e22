"""FSDP2: torchrun --nproc-per-node 2 tests/examples/fsdp2.py. Norms are of whole gradients, not of shards.

torch itself has no sharded update for fused SGD, fused Adagrad and Muon; and where some parameters are
sharded and others not, none of its fused or foreach updates takes both: pass foreach=False.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from torch_clip import clip
from torch_clip.methods import LinearRandAutoClip

dist.init_process_group("gloo")  # on GPUs "nccl"
rank, world = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (world,))
torch.manual_seed(0)
model = fully_shard(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), mesh=mesh)

optimizer = clip(
    torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), LinearRandAutoClip(0.25, beta=0.8)
)
for _ in range(20):
    x, y = torch.randn(64, 4).chunk(world)[rank], torch.randn(64, 1).chunk(world)[rank]
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
print(rank, optimizer.clipping.telemetry)
dist.destroy_process_group()
