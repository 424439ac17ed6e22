"""Mixed precision with GradScaler. `scaler.unscale_` is not needed: norms are those of the unscaled gradient.

A step that overflows is skipped: no parameter changes, and the norm does not enter the history.
"""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import AutoClip

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
x, y = torch.randn(64, 4, device=device), torch.randn(64, 1, device=device)

scaler = torch.amp.GradScaler(device)
optimizer = clip(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), AutoClip(percentile=0.5))
for _ in range(20):
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.float16):
        loss = nn.functional.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
print(optimizer.clipping.telemetry)
