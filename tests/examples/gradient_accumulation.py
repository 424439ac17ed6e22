"""Gradient accumulation: the sum is clipped, once for each step of the optimizer."""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import NormClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
x, y = torch.randn(64, 4), torch.randn(64, 1)
accumulate = 4

optimizer = clip(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), NormClip(threshold=0.5))
for _ in range(20):
    for x_part, y_part in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
        loss = nn.functional.mse_loss(model(x_part), y_part)
        (loss / accumulate).backward()
    optimizer.step()
    optimizer.zero_grad()
print(optimizer.clipping.telemetry)
