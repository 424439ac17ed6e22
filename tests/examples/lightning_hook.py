"""Lightning, with the clipping in its hook instead of in front of the optimizer."""

import lightning
import torch
from torch.nn import Linear, Sequential, Tanh, functional
from torch.utils.data import DataLoader, TensorDataset

from torch_clip.methods import NormClip


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers, self.clipping = Sequential(Linear(4, 16), Tanh(), Linear(16, 1)), NormClip(threshold=1.0)

    def training_step(self, batch):
        return functional.mse_loss(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clipping.clip_(self.parameters())  # an adaptive one: on_save_checkpoint, on_load_checkpoint


torch.manual_seed(0)
data, model = TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), Regression()
lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False).fit(model, DataLoader(data, batch_size=16))
print(model.clipping.telemetry)
