"""Telemetry says what was done, as the test measures it from outside."""

import math

import pytest
import torch

from torch_clip import CLIPPINGS, clip
from torch_clip.methods import CoordWiseClip, LayerWiseClip, NormClip


def norm_of(grads):
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))


def share_of_units(unit, before, after):
    """Clipped share of the gradient, its tensors or its elements, by comparing the two."""
    if unit == "elements":
        changed = [(old != new).flatten() for old, new in zip(before, after, strict=True)]
        return torch.cat(changed).double().mean().item()
    changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    return sum(changed) / len(changed) if unit == "tensors" else float(any(changed))


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", list(CLIPPINGS)[:9])  # of the others the law of that name
def test_telemetry(name, fused, path, heavy_tailed, parameters, device_path):
    if path == "device":
        device_path()
    params = parameters(*heavy_tailed(0, 1)[0])
    optimizer = clip(torch.optim.SGD(params, lr=0.0, fused=fused), CLIPPINGS[name]())
    assert optimizer.clipping.telemetry is None
    norms, clipped_steps = [], 0
    for step, grads in enumerate(heavy_tailed(5, 30)):
        before = [grad / 10 for grad in grads]
        for param, grad in zip(params, before, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        after = [param.grad for param in params]
        telemetry = optimizer.clipping.telemetry
        norms.append(norm_of(before))
        clipped = share_of_units(optimizer.clipping.unit, before, after)
        clipped_steps += clipped > 0
        assert float(telemetry.grad_norm) == pytest.approx(norms[-1], rel=1e-5)
        assert float(telemetry.clip_coef) == pytest.approx(norm_of(after) / norms[-1], rel=1e-5)
        assert float(telemetry.clipped) == pytest.approx(clipped)
        counts = telemetry.steps, telemetry.clipped_steps, telemetry.skipped_steps
        assert [int(count) for count in counts] == [step + 1, clipped_steps, 0]
        if "auto" in name:
            wanted = torch.tensor(norms, dtype=torch.float64).quantile(0.75).item()
        else:
            wanted = {"no_clip": math.inf, "coordinate_wise": 0.1}.get(name, 1.0)
        assert float(telemetry.threshold) == pytest.approx(wanted, rel=1e-5)
        is_tensor = {isinstance(value, torch.Tensor) for value in (telemetry.grad_norm, telemetry.steps)}
        assert is_tensor == {path == "device"}
    assert clipped_steps == 0 if name == "no_clip" else 0 < clipped_steps < 30


@pytest.mark.parametrize("path", ["host", "device"])
def test_shares_of_units(parameters, device_path, path):
    if path == "device":
        device_path()
    cases = [
        (NormClip(1.0), "steps", 1.0),
        (LayerWiseClip(1.0), "tensors", 0.25),
        (CoordWiseClip(1.0), "elements", 2 / 7),
    ]
    for clipping, unit, share in cases:
        telemetry = clipping.clip_(parameters([3.0, 0.1, -4.0], [0.5], [1.0], [0.2, 0.9]))
        assert clipping.unit == unit
        assert float(telemetry.clipped) == pytest.approx(share)


def test_what_clip_returns_is_the_telemetry(parameters):
    clipping = NormClip(1.0)
    telemetry = clipping.clip_(parameters([3.0, 4.0]))
    assert telemetry is clipping.telemetry
    assert telemetry == (5.0, 0.2, 1.0, 1.0, 1, 1, 0)
    clipping.reset()
    assert clipping.telemetry is None
    assert clipping.clip_(parameters([3.0, 4.0])).steps == 1


def test_telemetry_of_all_groups_is_one(parameters):
    first, second = parameters([3.0], [4.0])
    optimizer = clip(torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0), NormClip(1.0))
    optimizer.step()
    assert optimizer.clipping.telemetry.grad_norm == 5.0
    assert optimizer.clipping.telemetry.steps == 1
