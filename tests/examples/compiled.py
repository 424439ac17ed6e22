"""torch.compile of the model and of the optimizer's step; with the step not as `fullgraph`.

Clipping runs between two compiled graphs. torch's own optimizers break the graph in `step` too.
"""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import NormClip

torch.manual_seed(0)
model = torch.compile(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)))
x, y = torch.randn(64, 4), torch.randn(64, 1)

optimizer = clip(torch.optim.AdamW(model.parameters(), lr=1e-2), NormClip(threshold=0.5))
step = torch.compile(optimizer.step)
for _ in range(20):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    step()
print(optimizer.clipping.telemetry)
