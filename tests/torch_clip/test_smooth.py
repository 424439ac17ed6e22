"""Smooth clipping and normalised gradients: worked values, limits, and shapes with other parts."""

import math
import re

import numpy as np
import pytest
import torch

from torch_clip import Clipping, clip
from torch_clip.gates import RandomGate
from torch_clip.methods import AdaGN, NormalizedGrad, SmoothClip, SmoothSqrtClip
from torch_clip.schedules import Linear
from torch_clip.scopes import Element, Global, PerTensor, PerUnit
from torch_clip.shapes import hard, normalized, smooth, smooth_sqrt
from torch_clip.thresholds import Constant, MovingNorm, Percentile, WeightNorm, ZScore

SHAPES = {
    hard: lambda n, t: min(1.0, t / n),
    smooth: lambda n, t: t / (t + n),
    smooth_sqrt: lambda n, t: t / math.sqrt(t**2 + n**2),
    normalized: lambda n, t: t / n,
}
METHODS = {SmoothClip: smooth, SmoothSqrtClip: smooth_sqrt, NormalizedGrad: normalized}


def clipped(clipping, params):
    said = clipping.clip_(params)
    return [param.grad.tolist() for param in params], said


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        (SmoothClip, [3 / 6, 4 / 6]),
        (SmoothSqrtClip, [3 / math.sqrt(26), 4 / math.sqrt(26)]),
        (NormalizedGrad, [0.6, 0.8]),
    ],
)
def test_worked_values(path, parameters, method, wanted):
    ((got,), said) = clipped(method(1.0), parameters([3.0, 4.0]))
    assert got == pytest.approx(wanted, rel=1e-6)
    rounded = {
        SmoothClip: (0.5, 0.6667),
        SmoothSqrtClip: (0.58835, 0.78446),
        NormalizedGrad: (0.6, 0.8),
    }[method]
    assert got == pytest.approx(rounded, abs=5e-5)
    assert float(said.clip_coef) == pytest.approx(math.hypot(*wanted) / 5)
    assert (float(said.grad_norm), float(said.threshold), float(said.clipped)) == (5.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.1, 3.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_methods_follow_their_formula(path, heavy_tailed, parameters, method, threshold, dtype):
    clipping = method(threshold)
    for grads in heavy_tailed(0, 20, dtype, long=True):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        coef = SHAPES[METHODS[method]](norm, threshold)
        params = parameters(*grads)
        said = clipping.clip_(params)
        tolerance = {torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
        assert float(said.clip_coef) == pytest.approx(coef, rel=min(tolerance, 2e-5))
        for param, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(
                param.grad.double(), grad.double() * coef, rtol=tolerance, atol=1e-30, check_dtype=False
            )


@pytest.mark.parametrize("method", [SmoothClip, SmoothSqrtClip])
def test_an_infinite_threshold_is_the_identity_bit_for_bit(path, heavy_tailed, parameters, method):
    clipping = method(math.inf)
    for grads in heavy_tailed(1, 20):
        params = parameters(*grads)
        said = clipping.clip_(params)
        assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))
        assert (float(said.clip_coef), float(said.clipped)) == (1.0, 0.0)
    assert int(said.clipped_steps) == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_of_zero_zeroes(path, parameters, method):
    (got, said) = clipped(method(0.0), parameters([3.0], [-4.0]))
    assert got == [[0.0], [0.0]]
    assert float(said.clip_coef) == 0.0


@pytest.mark.parametrize("threshold", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_zero_gradient_stays_zero(path, parameters, method, threshold):
    if method is NormalizedGrad and threshold == math.inf:
        threshold = 1e30
    (got, said) = clipped(method(threshold), parameters([0.0, 0.0], [0.0]))
    assert got == [[0.0, 0.0], [0.0]]
    assert (float(said.clip_coef), float(said.clipped), float(said.grad_norm)) == (1.0, 0.0, 0.0)
    assert clipping_of_nothing(method(threshold)) == 1.0


def clipping_of_nothing(clipping):
    return float(clipping.clip_([torch.nn.Parameter(torch.ones(2))]).clip_coef)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-18, 1e-10, 1e10, 1e18])
def test_very_short_and_very_long_gradients(path, parameters, method, scale):
    ((got,), said) = clipped(method(1.0), parameters([3 * scale, 4 * scale]))
    assert all(map(math.isfinite, got))
    assert math.isfinite(float(said.clip_coef))
    if scale > 1e-20:  # the squares of shorter ones are zero in float32
        coef = SHAPES[METHODS[method]](5 * scale, 1.0)
        assert math.hypot(*got) == pytest.approx(5 * scale * coef, rel=1e-5)
    assert math.hypot(*got) <= 1.0 + 1e-6


@pytest.mark.parametrize(
    "make", [NormalizedGrad, AdaGN, lambda: Clipping(PerTensor(), Constant(1.0), shape=normalized)]
)
@pytest.mark.parametrize("value", [1e-45, 1e-42, 1e-38, 1e-30, 1e-22])
def test_a_very_short_number_alone(path, parameters, make, value):
    """Of one element the norm is not squared: what lengthens it may not reach infinity on the way to 1."""
    clipping = make()
    for grad in (value, -value):
        params = parameters(grad)
        said = clipping.clip_(params)
        assert params[0].grad.isfinite()
        assert params[0].grad.abs() <= 1.001
        assert math.isfinite(float(said.clip_coef))


def test_what_each_claims():
    assert SmoothClip().bounded
    assert SmoothSqrtClip().bounded
    assert not NormalizedGrad().bounded
    # Made of parts it is no other.
    assert not Clipping(PerTensor(), Constant(1.0), shape=normalized).bounded
    assert Clipping(PerTensor(), Constant(1.0), shape=smooth).bounded


def test_smooth_ones_grow_and_stay_below_the_threshold(path, parameters):
    for method in (SmoothClip, SmoothSqrtClip):
        after = [clipped(method(2.0), parameters([10.0**power]))[0][0][0] for power in range(-3, 6)]
        assert after == sorted(after)
        assert all(a <= min(2.0, 10.0**power) for a, power in zip(after, range(-3, 6), strict=True))
        assert after[-1] == pytest.approx(2.0, rel=1e-4)
        assert after[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("method", METHODS)
def test_not_finite(path, parameters, method, nonfinite):
    for bad in (math.nan, math.inf):
        params = parameters([bad], [4.0])
        method(1.0, nonfinite=nonfinite).clip_(params)
        if nonfinite == "skip":
            assert all(p.grad is None or not p.grad.any() for p in params)
        else:  # as torch.nn.utils.clip_grad_norm_
            assert params[0].grad.isnan().all()
            assert params[1].grad.item() == 0.0 or params[1].grad.isnan()


# Shapes with other scopes, thresholds and gates.


class Rule:
    """A threshold rule of one unit in float64, by its formula; with a percentile, z-score or average of 1."""

    def __init__(self, name):
        self.name, self.seen, self.gamma = name, [], math.inf

    def __call__(self, n, total, weight):
        self.seen.append(n)
        if self.name == "Constant":
            return 2.0
        if self.name == "Percentile":
            return np.quantile(self.seen[-5:], 0.5)
        if self.name == "WeightNorm":
            return 0.5 * weight
        if len(self.seen) <= 3:  # MovingNorm in its warm-up
            threshold = min(1.0, 50.0 / total) * n
            self.gamma = min(self.gamma, threshold)
            return threshold
        threshold = 1.05 * self.gamma
        self.gamma = 0.98 * self.gamma + 0.02 * min(n, threshold)
        return threshold


RULES = {
    "Constant": lambda: Constant(2.0),
    "Percentile": lambda: Percentile(0.5, 5),
    "WeightNorm": lambda: WeightNorm(0.5),
    "MovingNorm": lambda: MovingNorm(absolute=50.0, warmup=3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", [Global, PerTensor, PerUnit])
def test_every_shape_with_other_parts(path, scope, rule, shape):
    clipping = Clipping(scope(), RULES[rule](), shape=shape)
    rng = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, size, generator=rng).double()) for size in (2, 4)]
    rules = [Rule(rule) for _ in range(6)]
    for step in range(12):
        for param in params:
            noise = torch.randn(param.shape, generator=rng, dtype=torch.float64)
            param.grad = noise * (20.0 if step % 4 == 3 else 1.0)
        total = math.sqrt(sum(float(p.grad.square().sum()) for p in params))
        if scope is Global:
            units = [[(p.grad, p) for p in params]]
        elif scope is PerTensor:
            units = [[(p.grad, p)] for p in params]
        else:
            units = [[(g, w)] for p in params for g, w in zip(p.grad, p, strict=True)]
        wanted = []
        for unit, its in zip(units, rules, strict=False):
            n = math.sqrt(sum(float(g.square().sum()) for g, _ in unit))
            weight = math.sqrt(sum(float(w.detach().square().sum()) for _, w in unit))
            coef = SHAPES[shape](n, its(n, total, weight))
            wanted += [(g, g.clone() * coef) for g, _ in unit]
        clipping.clip_(params)
        for grad, want in wanted:
            torch.testing.assert_close(grad, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [smooth, smooth_sqrt, normalized])
def test_a_warmup_of_infinite_thresholds_is_let_through(path, parameters, shape):
    """ZScore has no bound at first: nothing to scale by, and nothing to lengthen to."""
    clipping = Clipping(Global(), ZScore(warmup=3), shape=shape)
    for _ in range(3):
        ((got,), said) = clipped(clipping, parameters([3.0, 4.0]))
        assert got == [3.0, 4.0]
        assert float(said.clip_coef) == 1.0
    ((got,), said) = clipped(clipping, parameters([3.0, 4.0]))
    assert all(map(math.isfinite, got))


def test_a_shape_with_a_gate(path, parameters):
    clipping = Clipping(Global(), Constant(1.0), RandomGate(0.5, 1), shape=smooth)
    outcomes = {
        round(clipped(clipping, parameters([3.0, 4.0]))[1].clip_coef.__float__(), 6) for _ in range(60)
    }
    assert outcomes == {1.0, round(1 / 6, 6)}


def test_normalized_per_tensor(path, parameters):
    clipping = Clipping(PerTensor(), Constant(2.0), shape=normalized)
    params = parameters([3.0, 4.0], [0.0, 0.0], [1e-3], [[1e6]])
    params[0].grad = None
    said = clipping.clip_(params)
    assert params[0].grad is None
    assert [p.grad.norm().item() for p in params[1:]] == pytest.approx([0.0, 2.0, 2.0])
    assert float(said.clip_coef) == pytest.approx(math.sqrt(8) / 1e6, rel=1e-5)


@pytest.mark.parametrize("scope", [Global, PerTensor, PerUnit])
def test_lengthening_by_more_than_float16_can_hold(path, scope):
    """The factor is 1e5, which is inf in float16, of which the outcome is 1."""
    weight = torch.nn.Parameter(torch.ones(1, 4, dtype=torch.float16))
    weight.grad = torch.tensor([[1e-5, 0.0, 0.0, 0.0]], dtype=torch.float16)
    Clipping(scope(), Constant(1.0), shape=normalized).clip_([weight])
    assert weight.grad.tolist() == [pytest.approx([1.0, 0.0, 0.0, 0.0], rel=1e-2)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_attached_it_is_clipping_by_hand(path, method, fused, weights, train):
    scheduled = (lambda: method(1.0), lambda: method(Linear(0.5, 5.0, steps=6)))
    for make in scheduled:
        one, two = weights(), weights()
        clipped_one = clip(torch.optim.SGD(one, lr=0.1, momentum=0.9, fused=fused), make())
        plain, by_hand = torch.optim.SGD(two, lr=0.1, momentum=0.9, fused=fused), make()
        for step in range(10):
            train(clipped_one, one, range(step, step + 1))
            rng = torch.Generator().manual_seed(step)
            for param in two:
                param.grad = torch.randn(param.shape, generator=rng) * (30 if step % 3 == 2 else 1)
            by_hand.clip_(two)
            plain.step()
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_combinations_that_make_no_sense_are_refused():
    for shape in (smooth, smooth_sqrt, normalized):
        with pytest.raises(
            ValueError, match=f"Element.* clamps; with shape {shape.__name__} use another scope"
        ):
            Clipping(Element(), Constant(1.0), shape=shape)
    with pytest.raises(ValueError, match=re.escape("norm must be in [0, inf), got inf")):
        NormalizedGrad(math.inf)
    with pytest.raises(ValueError, match=r"norm must be in \[0, inf"):
        NormalizedGrad(-1)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, inf\], got -1"):
        SmoothClip(-1)
