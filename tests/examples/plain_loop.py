"""A plain training loop. One line is new; `optimizer.step()` clips from then on."""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import NormClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
x, y = torch.randn(64, 4), torch.randn(64, 1)

optimizer = clip(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), NormClip(threshold=0.5))
for _ in range(20):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
print(optimizer.clipping.telemetry)
