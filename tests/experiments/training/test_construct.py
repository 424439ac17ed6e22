"""Config nodes become objects; a clipping that asks for the model gets it, wherever it stands."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import torch_clip
from experiments.errors import UserError
from experiments.runs import find_runs
from experiments.tasks.quadratic import Quadratic
from experiments.training.construct import construct
from experiments.training.state import seed_everything
from torch_clip.clipping import Transform
from torch_clip.methods import AGC, NormClip


class Upsampling(nn.Module):
    """Whose filters lie in the second dimension of its weight: 3 of them, not 2."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 2)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.up(noise.view(1, 2, 2, 5)).square().sum()


def trained(task: Quadratic, **settings) -> torch.Tensor:
    """The weight after 3 steps of SGD, each row clipped."""
    seed_everything(0)
    model = Upsampling()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    settings = {key: model if key == "model" else value for key, value in settings.items()}
    torch_clip.clip(optimizer, AGC(exclude=(), **settings))
    for _, batch in zip(range(3), task.train_loader(0), strict=False):
        optimizer.zero_grad()
        task.forward(model, batch).loss.backward()
        optimizer.step()
    return model.up.weight.detach()


def test_the_rows_of_a_transposed_convolution_are_its_filters(clipbench, monkeypatch):
    monkeypatch.setattr(Quadratic, "build_model", lambda task: Upsampling())
    monkeypatch.setattr(Quadratic, "evaluate", lambda task, model, device: (0.0, {}))
    argv = [
        "run",
        "task=quadratic",
        "clipping=agc",
        "clipping.exclude=[]",
        "optimizer=sgd",
        "optimizer.lr=0.1",
    ]
    argv += ["optimizer.momentum=0.9", "max_steps=3", "eval_every=3", "quiet=true", "keep=last"]
    assert clipbench(*argv) == 0
    (run,) = find_runs("results")
    weight = torch.load(run.checkpoint_path("last"), weights_only=True)["state"]["model"]["up.weight"]
    torch.testing.assert_close(weight, trained(Quadratic(), model=...))
    assert not torch.allclose(weight, trained(Quadratic()))


def clipped_filters(clipping: Transform, model: nn.Module) -> torch.Tensor:
    """Norms of the filters of the weight's gradient, once clipped; all weights and gradients are 1."""
    for param in model.parameters():
        param.data.fill_(1.0)
        param.grad = torch.ones_like(param)
    model.up.weight.grad[:, 0] = 0.0
    clipping.clip_(model.named_parameters())
    return model.up.weight.grad.transpose(0, 1).flatten(1).norm(dim=1)


AGC_NODE = {"_target_": "torch_clip.methods.AGC", "threshold": 0.5, "exclude": []}
NESTED = {
    "alone": AGC_NODE,
    "in a chain": {"_target_": "torch_clip.chain.Chain", "_args_": [AGC_NODE]},
    "as a scope": {
        "_target_": "torch_clip.clipping.Clipping",
        "scope": {"_target_": "torch_clip.scopes.PerUnit"},
        "threshold": {"_target_": "torch_clip.thresholds.WeightNorm", "_args_": [0.5]},
    },
}


@pytest.mark.parametrize("where", NESTED)
def test_a_part_that_takes_the_model_gets_it(where):
    model = Upsampling()
    clipping = construct(OmegaConf.create(NESTED[where]), "clipping", model)
    # A filter is 2 x 2 x 2 ones: its weight has norm sqrt(8).
    torch.testing.assert_close(clipped_filters(clipping, model), torch.tensor([0.0, 2**0.5, 2**0.5]))


class OfAnother(NormClip):
    def __init__(self, model: str = "none", threshold: float = 1.0) -> None:
        super().__init__(threshold)
        self.model = model


def test_a_setting_of_that_name_that_is_given_stays(monkeypatch):
    monkeypatch.setattr(torch_clip, "OfAnother", OfAnother, raising=False)
    node = OmegaConf.create({"_target_": "torch_clip.OfAnother", "model": "mine"})
    assert construct(node, "clipping", Upsampling()).model == "mine"


def test_what_is_refused_is_said_without_the_model():
    node = OmegaConf.create({**AGC_NODE, "threshold": -1})
    with pytest.raises(UserError) as caught:
        construct(node, "clipping", Upsampling())
    assert str(caught.value).startswith("clipping: threshold must be ")
    assert str(caught.value).endswith("; given threshold=-1, exclude=[]")
    with pytest.raises(UserError, match=r"clipping: .*nope"):
        construct(OmegaConf.create({"_target_": "nope.X"}), "clipping", Upsampling())
