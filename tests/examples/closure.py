"""A step with a closure: the gradient is clipped after the closure has made it.

LBFGS evaluates the closure many times in one step. Each evaluation is clipped and recorded, so that
`telemetry.steps` and the history of an adaptive method count evaluations.
"""

import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import NormClip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
x, y = torch.randn(64, 4), torch.randn(64, 1)
sgd = clip(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), NormClip(threshold=0.5))
lbfgs = clip(torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"), NormClip(threshold=1.0))


def closure():
    model.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


losses = [sgd.step(closure).item() for _ in range(20)] + [lbfgs.step(closure).item() for _ in range(2)]
print(losses[-1], sgd.clipping.telemetry, lbfgs.clipping.telemetry)
