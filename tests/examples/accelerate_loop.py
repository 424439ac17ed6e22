"""accelerate: attach, then `prepare`. `accelerator.clip_grad_norm_` would clip a second time.

`accelerator.save_state` and `load_state` carry the clipping's state with the optimizer's.
"""

import torch
from accelerate import Accelerator
from torch import nn

from torch_clip import clip
from torch_clip.methods import AutoClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
loader = torch.utils.data.DataLoader(data, batch_size=8)
optimizer = clip(torch.optim.AdamW(model.parameters(), lr=1e-2), AutoClip(percentile=0.5))

accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _ in range(3):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
print(optimizer.optimizer.clipping.telemetry)  # prepare has wrapped the clipped optimizer
