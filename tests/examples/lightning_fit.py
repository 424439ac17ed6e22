"""Lightning: return a clipped optimizer, whose checkpoints carry the clipping's state; no gradient_clip_val.

With `gradient_clip_val` Lightning would clip too, before the optimizer does.
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_clip import clip
from torch_clip.methods import NormClip


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch):
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return clip(torch.optim.AdamW(self.parameters(), lr=1e-2), NormClip(threshold=1.0))


torch.manual_seed(0)
data, model = TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), Regression()
lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False).fit(model, DataLoader(data, batch_size=16))
print(model.optimizers().optimizer.clipping.telemetry)
