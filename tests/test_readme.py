"""The README's code, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from torch_clip import CLIPPINGS
from torch_clip.methods import LayerWiseClip

README = (Path(__file__).parent.parent / "README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


def surroundings() -> dict:
    """The names that the examples leave undefined."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs, labels = torch.randn(16, 4) * 100, torch.randint(2, (16,))
    return {
        "torch": torch,
        "net": net,
        "model": net,
        "inputs": inputs,
        "labels": labels,
        "my_loss_function": nn.CrossEntropyLoss(),
        "criterion": nn.CrossEntropyLoss(),
        "EPOCHS": 2,
        "train_loader": [(inputs, labels)] * 3,
    }


def test_first_example_of_the_seed():
    names = surroundings()
    before = [param.clone() for param in names["net"].parameters()]
    exec(block("python", "loss = my_loss_function"), names)
    optimizer = names["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    assert isinstance(optimizer.clipping, LayerWiseClip)
    assert optimizer.clipping.threshold.value == 1.0  # B3: an int is no reason to take another default
    assert optimizer.clipping.telemetry.steps == 6
    assert optimizer.clipping.telemetry.clipped_steps > 0
    assert all((a != b).any() for a, b in zip(before, names["net"].parameters(), strict=True))


def test_second_example_of_the_seed_with_restarts():
    names = surroundings()
    names["EPOCHS"] = 30  # 90 steps: restarts after 50 points
    before = [param.clone() for param in names["net"].parameters()]
    exec(block("python", "Restarter("), names)
    optimizer, restarter = names["optimizer"], names["restarter"]
    assert optimizer.clipping.telemetry.steps == 90
    assert optimizer.clipping.threshold.value == 1.0
    state = restarter.state_dict()
    assert state["interval"]["length"] == 63  # 50 * 1.25, rounded up
    assert state["mean"]["count"] == 40  # points since
    assert all((a != b).any() for a, b in zip(before, names["net"].parameters(), strict=True))


def test_library_example():
    names = surroundings()
    exec(block("python", "AutoClip(percentile=0.9)"), names)
    names["net"](names["inputs"]).sum().backward()
    names["optimizer"].step()
    told = re.search(r"optimizer.clipping.telemetry  # (.*)", README).group(1).split(", ")
    assert tuple(told) == names["optimizer"].clipping.telemetry._fields
    names["clipping"] = CLIPPINGS["norm"]()
    exec(re.search(r"clipping.clip_\(model.parameters\(\)\)", README).group(0), names)
    assert names["clipping"].telemetry.steps == 1


def test_table_of_methods_lists_each_with_its_class():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", README, re.MULTILINE))
    assert rows == {name: method.__name__ for name, method in CLIPPINGS.items()}


def test_method_of_the_guide_runs():
    import torch_clip.methods as methods

    names = dict(vars(methods))
    text = block("python", "class LayerWiseRandClip(Clipping)")
    exec("\n".join(line.removeprefix("   ") for line in text.splitlines()), names)
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([300.0, 400.0])
    told = names["LayerWiseRandClip"](beta=1.0).clip_([param])
    assert told.clipped == 1.0
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def test_first_screen_gives_the_two_commands():
    screen = README.splitlines()[:25]
    assert "pip install -e '.[bench]' && clipbench run task=cola clipping=auto_clip" in screen
    assert "pip install -e '.[test]' && pytest" in screen
