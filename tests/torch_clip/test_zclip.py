"""ZClip against its paper: worked value, a float64 reference, and what the published code dies of."""

import io
import math
import re

import numpy as np
import pytest
import torch

from torch_clip import clip
from torch_clip.methods import ZClip


@pytest.fixture
def step(parameters):
    """A step with a gradient of the given norm: (clipping, norm) -> telemetry; the gradient is checked."""

    def run(clipping, norm, dtype=torch.float64):
        params = parameters([0.6 * norm], [0.8 * norm], dtype=dtype)
        said = clipping.clip_(params)
        if math.isfinite(norm):
            wanted = [share * norm * float(said.clip_coef) for share in (0.6, 0.8)]
            assert [p.grad.item() for p in params] == pytest.approx(wanted, rel=1e-5)
        return said

    return run


def heavy_tailed_norms(count, seed=0):
    """Around 3 with a slow drift, and spikes of a Student-t(2) tail."""
    rng = np.random.default_rng(seed)
    return 3 + np.abs(rng.standard_t(2, count)) + np.sin(np.arange(count) / 30)


def reference(norms, z_max=2.5, decay=0.97, warmup=25, target="reciprocal", cap=math.inf):
    """Coefficient of each step, and the mean and variance after it (C1)."""
    first, mean, variance, out = [], None, None, []
    for n in norms:
        threshold = math.inf
        if mean is None:
            first.append(n)
            if len(first) == warmup:
                mean, variance = np.mean(first), np.mean((np.array(first) - np.mean(first)) ** 2)
        else:
            std = math.sqrt(variance)
            z = (n - mean) / (std + 1e-6)
            kept = n
            if z > z_max:
                kept = threshold = {
                    "reciprocal": mean + z_max * std / (z / z_max),
                    "mean": mean,
                    "fixed": mean + z_max * std,
                }[target]
            mean = decay * mean + (1 - decay) * kept
            variance = decay * variance + (1 - decay) * (kept - mean) ** 2
        out.append((min(1.0, min(threshold, cap) / n), mean, variance))
    return out


def test_worked_value(path, step):
    clipping = ZClip(warmup=3)
    for norm in (1.0, 2.0, 3.0):
        assert float(step(clipping, norm).threshold) == math.inf
    state = clipping.state_dict()
    assert float(state["mean"]) == 2.0
    assert float(state["variance"]) == pytest.approx(2 / 3, rel=1e-12)

    said = step(clipping, 10.0)
    deviation = math.sqrt(2 / 3)
    assert (10 - 2) / (deviation + 1e-6) == pytest.approx(9.797947, abs=1e-6)
    assert float(said.threshold) == pytest.approx(2.520834, abs=1e-6)
    assert float(said.clip_coef) == pytest.approx(0.2520834, abs=1e-7)
    assert (float(said.clipped), float(said.grad_norm)) == (1.0, 10.0)
    state = clipping.state_dict()
    assert float(state["mean"]) == pytest.approx(2.01562502, abs=1e-8)
    assert float(state["variance"]) == pytest.approx(0.65432375, abs=1e-8)


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("target", ["reciprocal", "mean", "fixed"])
def test_every_target_follows_its_formula(path, step, target, cap):
    clipping = ZClip(target=target, max_grad_norm=cap)
    norms = heavy_tailed_norms(300)
    wanted = reference(norms, target=target, cap=math.inf if cap is None else cap)
    clipped = 0
    for norm, (coef, mean, variance) in zip(norms, wanted, strict=True):
        said = step(clipping, norm)
        assert float(said.clip_coef) == pytest.approx(coef, rel=1e-9)
        clipped += float(said.clipped)
        state = clipping.state_dict()
        if mean is not None:
            assert float(state["mean"]) == pytest.approx(mean, rel=1e-9)
            assert float(state["variance"]) == pytest.approx(variance, rel=1e-9)
    assert clipped == sum(coef < 1 for coef, *_ in wanted)
    assert 5 < clipped < 300
    assert int(said.clipped_steps) == clipped


@pytest.mark.parametrize(
    "settings", [{"z_threshold": 1.5, "decay": 0.9, "warmup": 1}, {"z_threshold": 4.0, "decay": 0.0}]
)
def test_other_settings_and_float32(path, step, settings):
    clipping = ZClip(**settings)
    norms = heavy_tailed_norms(200, seed=1)
    names = {"z_threshold": "z_max"}
    wanted = reference(norms, **{names.get(key, key): value for key, value in settings.items()})
    for norm, (coef, *_) in zip(norms, wanted, strict=True):
        said = step(clipping, norm, torch.float32)
        assert float(said.clip_coef) == pytest.approx(coef, rel=2e-4)


def test_nothing_is_capped_unless_asked(path, step):
    # The published code caps at 1.0 by default: a run whose norm is 100 is clipped at every step.
    clipping, capped = ZClip(warmup=5), ZClip(warmup=5, max_grad_norm=50)
    for k in range(40):
        assert float(step(clipping, 100.0 + k % 3).clip_coef) == 1.0
        said = step(capped, 100.0 + k % 3)
        # In the warm-up too; what is remembered are the norms that came, so that the two stay alike.
        assert float(said.threshold) == 50.0
        assert float(said.clip_coef) == pytest.approx(50 / (100 + k % 3))
    assert float(capped.state_dict()["mean"]) == float(clipping.state_dict()["mean"])
    # A spike is brought to T, or to the cap where that is lower.
    assert 100 < float(step(clipping, 1e4).threshold) < 110
    assert float(step(capped, 1e4).threshold) == 50.0
    assert float(step(ZClip(max_grad_norm=math.inf), 1e4).clip_coef) == 1.0


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_remembered(path, step, nonfinite, bad):
    clean, spoilt = ZClip(warmup=10, nonfinite=nonfinite), ZClip(warmup=10, nonfinite=nonfinite)
    bad_at = (0, 3, 9, 10, 11, 30, 31, 50)
    spikes = 0
    for k, norm in enumerate(heavy_tailed_norms(80)):
        if k in bad_at:
            said = step(spoilt, bad)
            assert not math.isfinite(float(said.grad_norm))
            if nonfinite == "skip":
                assert (float(said.clip_coef), float(said.clipped)) == (1.0, 0.0)
        wanted, got = step(clean, norm), step(spoilt, norm)
        assert (float(got.threshold), float(got.clip_coef)) == (
            float(wanted.threshold),
            float(wanted.clip_coef),
        )
        spikes += float(got.clipped)
    assert spikes > 0
    assert int(spoilt.telemetry.skipped_steps) == (len(bad_at) if nonfinite == "skip" else 0)
    for name in ("mean", "variance"):
        assert float(spoilt.state_dict()[name]) == float(clean.state_dict()[name])


def test_zeros_say_nothing(path, step, parameters):
    clean, other = ZClip(warmup=5), ZClip(warmup=5)
    for k, norm in enumerate(heavy_tailed_norms(30)):
        if k % 4 == 0:
            assert float(step(other, 0.0).clip_coef) == 1.0
            other.clip_([])
            other.clip_([torch.nn.Parameter(torch.ones(2))])
        assert float(step(other, norm).threshold) == float(step(clean, norm).threshold)


def test_equal_norms_are_no_spikes(path, step):
    # A spread of zero: neither a division by it, nor a spike made by rounding.
    clipping = ZClip(warmup=4)
    for norm in (5.0,) * 20:
        said = step(clipping, norm, torch.float32)
        assert (float(said.clip_coef), int(said.clipped_steps)) == (1.0, 0)
    assert float(step(clipping, 50.0).threshold) == pytest.approx(5.0, abs=1e-4)


@pytest.mark.parametrize("after", [0, 3, 10, 11, 40])
def test_resuming_through_a_file(path, step, same, after):
    one, other = ZClip(warmup=10), ZClip(warmup=10)
    norms = heavy_tailed_norms(80)
    for norm in norms[:after]:
        step(one, norm)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for norm in norms[after:]:
        wanted, got = step(one, norm), step(other, norm)
        assert same(tuple(got), tuple(wanted))
    assert same(other.state_dict(), one.state_dict())
    other.reset()
    assert float(step(other, 1.0).threshold) == math.inf


def test_a_state_of_one_path_goes_on_on_the_other(step, device_path):
    one, norms = ZClip(warmup=10), heavy_tailed_norms(60)
    for norm in norms[:30]:
        step(one, norm)
    state = one.state_dict()
    wanted = [step(one, norm).threshold for norm in norms[30:]]
    device_path()
    other = ZClip(warmup=10)
    other.load_state_dict(state)
    got = [float(step(other, norm).threshold) for norm in norms[30:]]
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_a_spike_does_not_reach_an_optimizer(path, parameters, fused):
    (param,) = parameters([1.0])
    optimizer = clip(torch.optim.SGD([param], lr=1.0, momentum=0.9, fused=fused), ZClip(warmup=5))
    for k in range(20):
        param.grad = torch.tensor([1.0 + 0.1 * (k % 3)])
        optimizer.step()
    before = param.detach().clone()
    momentum = optimizer.state[param]["momentum_buffer"].clone()
    param.grad = torch.tensor([1e6])
    optimizer.step()
    # Clipped to about the mean of 1.1, which momentum takes in.
    assert (before - param).item() == pytest.approx(0.9 * momentum.item() + 1.1, abs=0.05)
    param.grad = torch.tensor([math.nan])
    optimizer.step()
    param.grad = torch.tensor([1e6])
    optimizer.step()
    assert float(optimizer.clipping.telemetry.threshold) == pytest.approx(1.1, abs=0.05)
    assert int(optimizer.clipping.telemetry.skipped_steps) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"z_threshold": 0}, "z_threshold must be in (0, inf), got 0"),
        ({"z_threshold": math.nan}, "z_threshold must be in (0, inf), got nan"),
        ({"decay": 1}, "decay must be in [0, 1), got 1"),
        ({"decay": -0.1}, "decay must be in [0, 1), got -0.1"),
        ({"warmup": 0}, "warmup must be a whole number from 1, got 0"),
        ({"warmup": 2.5}, "warmup must be a whole number from 1, got 2.5"),
        ({"warmup": math.inf}, "warmup must be a whole number from 1, got inf"),
        ({"warmup": math.nan}, "warmup must be a whole number from 1, got nan"),
        ({"target": "median"}, "target must be one of reciprocal, mean, fixed, got 'median'"),
        ({"max_grad_norm": 0}, "max_grad_norm must be in (0, inf], or None, got 0"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ZClip(**settings)
