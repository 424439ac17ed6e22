"""A loop of one's own, without an optimizer: `clip_` changes the gradients and says what it did."""

import torch
from torch import nn

from torch_clip.methods import NormClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
x, y = torch.randn(64, 4), torch.randn(64, 1)

clipping = NormClip(threshold=0.5)
for _ in range(20):
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    telemetry = clipping.clip_(model.parameters())
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:  # clip_ takes a gradient away that is not finite
                param -= 0.1 * param.grad
print(telemetry)
