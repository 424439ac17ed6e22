"""GradScaler: the same scales, skips and parameters as clip_grad_norm_ after unscale_."""

import pytest
import torch

from torch_clip import CLIPPINGS, clip
from torch_clip.methods import AutoClip, NormClip

PROBLEM = [(4, 3), (5,)]


def run(optimizer_of, *, fused, unscale, by_hand=None, overflow_at=(), steps=6):
    """Train with a GradScaler; returns parameters, the scale after each step, and the optimizer."""
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in PROBLEM]
    optimizer = optimizer_of(params, fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        noise = [torch.randn(param.shape, generator=rng) for param in params]
        loss = sum((n * p).sum() for n, p in zip(noise, params, strict=True))
        scaler.scale(loss * (torch.inf if step in overflow_at else 1.0)).backward()
        norms.append(sum((n**2).sum() for n in noise).sqrt().item())
        if unscale:
            scaler.unscale_(optimizer)
        if by_hand is not None:
            torch.nn.utils.clip_grad_norm_(params, by_hand)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    return params, scales, norms, optimizer


def make(cls, clipping, **settings):
    def optimizer_of(params, fused):
        optimizer = cls(params, lr=0.1, fused=fused, **settings)
        return optimizer if clipping is None else clip(optimizer, clipping)

    return optimizer_of


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("overflow_at", [(), (0,), (1,), (0, 1, 4)])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("cls", "settings"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})], ids=["sgd", "adamw"]
)
def test_grad_scaler(cls, settings, fused, unscale, overflow_at, path, device_path):
    # torch's recipe, not fused: its fused SGD starts from garbage when the first step overflows.
    reference = make(cls, None, **settings)
    wanted, wanted_scales, norms, _ = run(
        reference, fused=False, unscale=True, by_hand=2.0, overflow_at=overflow_at
    )
    if path == "device":
        device_path()
    clipping = NormClip(2.0)
    params, scales, _, _ = run(
        make(cls, clipping, **settings), fused=fused, unscale=unscale, overflow_at=overflow_at
    )
    torch.testing.assert_close(params, wanted, rtol=1e-4, atol=1e-5)
    assert scales == wanted_scales
    # Norms in telemetry are those without the scale; a step that the scaler never makes cannot be counted.
    assert float(clipping.telemetry.grad_norm) == pytest.approx(norms[-1], rel=1e-5)
    assert int(clipping.telemetry.skipped_steps) == (len(overflow_at) if fused else 0)
    assert int(clipping.telemetry.steps) == 6 - (0 if fused else len(overflow_at))


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_every_method_is_equal_with_and_without_unscale(name, path, device_path):
    """Fused and not unscaled by the user, the kernel unscales; per tensor and per element we do it before."""
    if path == "device":
        device_path()
    results, states = [], []
    for fused, unscale in ((False, True), (True, True), (True, False)):
        clipping = CLIPPINGS[name](**({"threshold": 1.5} if name == "layer_wise" else {}))
        results.append(run(make(torch.optim.SGD, clipping), fused=fused, unscale=unscale)[0])
        states.append(clipping.state_dict())
    for result, state in zip(results[1:], states[1:], strict=True):
        torch.testing.assert_close(result, results[0])
        assert state["clipped_steps"] == states[0]["clipped_steps"]


def test_an_overflow_does_not_enter_the_history():
    # B16
    clipping = AutoClip(0.5)
    _, _, norms, _ = run(make(torch.optim.SGD, clipping), fused=True, unscale=False, overflow_at=(0, 3))
    kept = [norm for step, norm in enumerate(norms) if step not in (0, 3)]
    assert clipping.threshold.history.tolist() == pytest.approx(sorted(kept), rel=1e-5)


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_a_skip_that_the_scaler_decided_stays_one(name, path, parameters, device_path):
    """It may have seen an Inf that is not in these gradients."""
    if path == "device":
        device_path()
    params = parameters([3.0, 4.0])
    optimizer = clip(torch.optim.SGD(params, lr=1.0, momentum=0.9, fused=True), CLIPPINGS[name]())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert params[0].tolist() == [1.0, 1.0]
    assert (optimizer.grad_scale.item(), optimizer.found_inf.item()) == (2.0, 1.0)
