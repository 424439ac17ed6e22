"""Learning rate schedulers: made before or after attaching the clipping, and loaded, as without it."""

import torch
from torch import nn
from torch.optim import lr_scheduler

from torch_clip import clip
from torch_clip.methods import NormClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
x, y = torch.randn(64, 4), torch.randn(64, 1)

optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
clip(optimizer, NormClip(threshold=0.5))
decay = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
for _ in range(20):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    warmup.step()
    decay.step()
print(decay.get_last_lr(), optimizer.clipping.telemetry)
