"""Hugging Face Trainer, with max_grad_norm=0: its default of 1.0 clips too, before the optimizer does."""

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from torch_clip import clip
from torch_clip.methods import AutoClip


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x, labels):
        output = self.layers(x)
        return {"loss": nn.functional.mse_loss(output, labels), "logits": output}


torch.manual_seed(0)
data = [{"x": torch.randn(4), "labels": torch.randn(1)} for _ in range(64)]
model = Regression()
optimizer = clip(torch.optim.AdamW(model.parameters(), lr=1e-2), AutoClip(percentile=0.5))
settings = TrainingArguments("checkpoints", max_grad_norm=0, max_steps=20, save_steps=10, report_to="none")
trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
trainer.train()  # resume_from_checkpoint=True goes on with the clipping's state too
print(optimizer.clipping.telemetry)
