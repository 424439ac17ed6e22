"""Parameters in bfloat16 or float16: norms are summed in float32 all the same."""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import NormClip

optimizers = {}
for dtype in (torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    x, y = torch.randn(64, 4, dtype=dtype), torch.randn(64, 1, dtype=dtype)
    optimizers[dtype] = clip(
        torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4), NormClip(threshold=0.5)
    )
    for _ in range(20):
        optimizers[dtype].zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizers[dtype].step()
    print(dtype, optimizers[dtype].clipping.telemetry)
