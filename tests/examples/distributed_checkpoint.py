"""Distributed checkpoint; run it again to go on: torchrun --nproc-per-node 2 distributed_checkpoint.py"""

import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from torch_clip import clip
from torch_clip.methods import LinearRandAutoClip

dist.init_process_group("gloo")  # on GPUs "nccl"
torch.manual_seed(0)
model = fully_shard(torch.nn.Linear(4, 4), mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = clip(torch.optim.AdamW(model.parameters(), fused=True), LinearRandAutoClip(0.25, beta=0.8))
model_state, optimizer_state = get_state_dict(model, optimizer)
if os.path.exists("checkpoint"):
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="checkpoint")
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    optimizer.clipping.load_state_dict(torch.load("checkpoint/clipping.pt"))  # after set_state_dict
for _ in range(10):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
model_state, optimizer_state = get_state_dict(model, optimizer)  # of the optimizer what torch knows
dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id="checkpoint")
if dist.get_rank() == 0:  # beside it the clipping's, which is equal on all ranks
    torch.save(optimizer.clipping.state_dict(), "checkpoint/clipping.pt")
