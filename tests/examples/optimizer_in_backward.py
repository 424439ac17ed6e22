"""Stepping inside the backward pass: each gradient is clipped by itself, stepped with, and freed."""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import LayerWiseClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizers = {  # one for each parameter; a norm over all of them cannot be known before the last has stepped
    param: clip(torch.optim.SGD([param], lr=0.1), LayerWiseClip(threshold=0.1))
    for param in model.parameters()
}


def step_and_free(param):
    optimizers[param].step()
    optimizers[param].zero_grad()


for param in model.parameters():
    param.register_post_accumulate_grad_hook(step_and_free)

for _ in range(10):
    x = torch.randn(32, 8)
    nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
