"""Settings that follow the step: their closed forms, on both paths, saved and resumed at the right step."""

import io
import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_clip import Clipping, clip
from torch_clip.gates import RandomGate, uniform
from torch_clip.methods import (
    AGC,
    AdaGC,
    AutoClip,
    CoordWiseClip,
    LayerWiseAutoClip,
    LayerWiseClip,
    LinearRandAutoClip,
    LinearRandNormClip,
    NormalizedGrad,
    NormClip,
    SmoothClip,
    SpamClip,
    SpikeGuard,
    UClip,
    ZClip,
)
from torch_clip.schedules import Constant, Cosine, Linear
from torch_clip.scopes import PerTensor
from torch_clip.thresholds import Percentile


def mixed(start, end, left):
    return start * left + end * (1.0 - left)


CLOSED = {
    Linear: lambda a, b, steps, k: mixed(a, b, 1.0 - min(k / steps, 1.0)),
    Cosine: lambda a, b, steps, k: mixed(a, b, (1 + math.cos(math.pi * min(k / steps, 1.0))) / 2),
}


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# The functions.


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize(("start", "end"), [(10.0, 1.0), (0.1, 0.7), (1e-3, 1e3), (2.0, 2.0), (0, 1)])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_closed_forms(kind, start, end, steps):
    schedule = kind(start, end, steps)
    for k in (0, 1, steps // 2, steps - 1, steps, steps + 1, 10**9):
        wanted = CLOSED[kind](start, end, steps, k)
        got = schedule(k)
        assert type(got) is float
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-15 * max(1, start, end))
        there = schedule(torch.tensor(k))
        assert (there.dtype, there.shape) == (torch.float64, ())
        assert there.item() == pytest.approx(got, rel=1e-14, abs=1e-16)
        assert min(start, end) <= got <= max(start, end)
    assert schedule(steps) == schedule(10 * steps) == end
    assert schedule(0) == pytest.approx(start, rel=1e-15)


def test_constant():
    assert Constant(3)(0) == Constant(3)(10**9) == 3.0
    assert Constant(3)(torch.tensor(5)).item() == 3.0


def test_repr_says_the_setting():
    assert repr(Linear(10, 1.0, steps=3)) == "Linear(10, 1, steps=3)"
    assert repr(Cosine(0.5, 1e-6, 10)) == "Cosine(0.5, 1e-06, steps=10)"
    assert repr(Constant(2.5)) == "Constant(2.5)"
    assert "Linear(10, 1, steps=3)" in repr(NormClip(Linear(10, 1, 3)))
    assert "beta=Linear(" in repr(LinearRandNormClip(1.0, Linear(0.1, 1, 3)))
    assert "Percentile(Linear(" in repr(AutoClip(Linear(0.1, 1, 3)))


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "steps must be a whole number from 1, got 0"),
        ((0, 1, 2.5), "steps must be a whole number from 1, got 2.5"),
        ((0, 1, math.inf), "steps must be a whole number from 1, got inf"),
        ((0, 1, math.nan), "steps must be a whole number from 1, got nan"),
        ((math.inf, 1, 3), "a schedule goes between finite numbers, got inf and 1"),
        ((0, math.nan, 3), "a schedule goes between finite numbers, got 0 and nan"),
    ],
)
def test_a_wrong_schedule_is_named(kind, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(*arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: NormClip(s(1.0, -1.0, 5)), r"threshold must be in \[0, inf\], got \w+\(1, -1, steps=5\)"),
        (lambda s: CoordWiseClip(s(-1.0, 1.0, 5)), r"threshold must be in \[0, inf\], got"),
        (lambda s: UClip(s(-1.0, 1.0, 5)), r"threshold must be in \[0, inf\], got"),
        (lambda s: AGC(s(-1.0, 1.0, 5)), r"threshold must be in \[0, inf\], got"),
        (lambda s: NormalizedGrad(s(-1.0, 1.0, 5)), r"norm must be in \[0, inf\), got"),
        (lambda s: AutoClip(s(0.0, 1.0, 5)), r"percentile must be in \(0, 1\], got"),
        (lambda s: AutoClip(s(0.5, 75, 5)), r"percentile must be in \(0, 1\], got"),
        (lambda s: LayerWiseAutoClip(s(0.5, 1.5, 5)), r"percentile must be in \(0, 1\], got"),
        (lambda s: LinearRandNormClip(1.0, s(0.0, 1.0, 5)), r"beta must be in \(0, 1\], got"),
    ],
)
@pytest.mark.parametrize("kind", CLOSED)
def test_a_schedule_out_of_range_is_named(kind, make, message):
    with pytest.raises(ValueError, match=message):
        make(kind)


OTHER_SETTINGS = [
    (ZClip, "z_threshold"),
    (ZClip, "decay"),
    (ZClip, "max_grad_norm"),
    (AGC, "eps"),
    (AdaGC, "decay"),
    (AdaGC, "absolute"),
    (SpamClip, "theta"),
    (SpamClip, "decay"),
    (UClip, "decay"),
    (UClip, "cap"),
    (SpikeGuard, "sigma"),
]


@pytest.mark.parametrize(("method", "name"), OTHER_SETTINGS)
def test_a_setting_that_takes_none_follows_it_or_says_so_when_made(parameters, method, name):
    """Not at the first step, some minutes into a run; and not by taking it for something else."""
    try:
        clipping = method(**{name: Linear(0.5, 0.9, steps=5)})
    except (TypeError, ValueError):
        return
    repr(clipping)
    for _ in range(40):
        clipping.clip_(parameters([3.0, 4.0]))


# In a clipping.


@pytest.mark.parametrize("kind", CLOSED)
def test_a_threshold_follows_the_step(path, parameters, kind):
    for method in (NormClip, CoordWiseClip, LayerWiseClip, UClip):
        clipping = method(kind(10.0, 1.0, 6))
        for k in range(9):
            params = parameters([100.0])
            said = clipping.clip_(params)
            wanted = CLOSED[kind](10.0, 1.0, 6, k)
            assert float(said.threshold) == pytest.approx(wanted, rel=1e-6)
            assert params[0].grad.item() == pytest.approx(wanted, rel=1e-6)
    clipping, weight = AGC(kind(0.1, 0.5, 6), exclude=None), parameters([[100.0]], dtype=torch.float64)
    for k in range(9):
        weight[0].grad.fill_(100.0)
        clipping.clip_(weight)
        assert weight[0].grad.item() == pytest.approx(CLOSED[kind](0.1, 0.5, 6, k), rel=1e-9)


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("window", [None, 5])
def test_a_percentile_follows_the_step(path, parameters, kind, window):
    clipping = AutoClip(kind(1.0, 0.2, 10), window)
    per_tensor = Clipping(PerTensor(), Percentile(kind(1.0, 0.2, 10), 5))
    norms = np.abs(np.random.default_rng(0).standard_t(2, 25)) + 0.1
    for k, norm in enumerate(norms):
        p = CLOSED[kind](1.0, 0.2, 10, k)
        said = clipping.clip_(parameters([norm], dtype=torch.float64))
        seen = norms[max(0, k + 1 - window) : k + 1] if window else norms[: k + 1]
        assert float(said.threshold) == pytest.approx(np.quantile(seen, p), rel=1e-9)
        params = parameters([norm], [2 * norm], dtype=torch.float64)
        per_tensor.clip_(params)
        threshold = np.quantile(norms[max(0, k - 4) : k + 1], p)
        assert [p.grad.item() for p in params] == pytest.approx(
            [min(norm, threshold), 2 * min(norm, threshold)], rel=1e-9
        )


@pytest.mark.parametrize("kind", CLOSED)
def test_a_beta_follows_the_step(path, parameters, kind):
    clipping = LinearRandNormClip(1.0, kind(0.01, 1.0, 20), seed=3)
    per_tensor = Clipping(PerTensor(), Percentile(1e-9, 100), RandomGate(kind(0.01, 1.0, 20), 2, seed=3))
    fired = []
    for k in range(40):
        beta = CLOSED[kind](0.01, 1.0, 20, k)
        said = clipping.clip_(parameters([2.0]))
        fired.append(uniform(3, k) < beta**0.5)
        assert float(said.clipped) == fired[-1]
        norm = 1.0 if k == 0 else 2.0
        params = parameters([norm], [norm])
        per_tensor.clip_(params)
        clipped = k > 0 and uniform(3, k) < beta**0.25
        assert params[0].grad.item() == pytest.approx(1.0 if clipped else norm, rel=1e-6)
    assert all(fired[20:])
    assert not all(fired[:10])


def test_plain_functions_too(path, parameters):
    asked = []

    def halving(step):
        kind = "int" if type(step) is int else (step.dtype, tuple(step.shape))
        asked.append((int(step), kind))
        return 8.0 / 2.0**step

    clipping = NormClip(halving)
    for k in range(5):
        params = parameters([100.0])
        clipping.clip_(params)
        assert params[0].grad.item() == pytest.approx(8.0 / 2**k)
    kind = "int" if path == "host" else (torch.int64, ())
    assert asked == [(k, kind) for k in range(5)]
    assert NormClip(lambda step: 3).clip_(parameters([4.0])).clip_coef == pytest.approx(0.75)  # an int
    said = AutoClip(lambda step: 0.5).clip_(parameters([4.0]))
    assert float(said.threshold) == 4.0
    repr(NormClip(halving))


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_skipped_and_empty_steps_count(path, parameters, nonfinite):
    clipping = NormClip(Linear(10.0, 0.0, 10), nonfinite=nonfinite)
    for k, value in enumerate((100.0, math.nan, None, 100.0, math.inf, 100.0)):
        said = clipping.clip_([] if value is None else parameters([value]))
        if value == 100.0:
            assert float(said.threshold) == pytest.approx(10.0 - k)
    guard_skips = SpikeGuard(sigma=3.0, window=20, min_history=5)
    assert int(guard_skips.clip_(parameters([1.0])).steps) == 1


SCHEDULED = {
    "threshold": lambda: NormClip(Cosine(5.0, 0.5, 12)),
    "elements": lambda: CoordWiseClip(Linear(1.0, 0.1, 12)),
    "percentile": lambda: AutoClip(Linear(0.9, 0.1, 12)),
    "beta": lambda: LinearRandAutoClip(0.3, Cosine(0.1, 1.0, 12)),
    "carry": lambda: UClip(Linear(1.0, 0.1, 12)),
    "smooth": lambda: SmoothClip(Linear(5.0, 0.5, 12)),
    "rows": lambda: AGC(Linear(0.5, 0.1, 12), exclude=None),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SCHEDULED)
def test_resuming_with_an_optimizer(path, train, weights, same, name, fused):
    make = SCHEDULED[name]
    params, others = weights(), weights()
    one = clip(torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=fused), make())
    other = clip(torch.optim.SGD(others, lr=0.1, momentum=0.9, fused=fused), make())
    for param in params:  # a skipped step, which the schedule counts
        param.grad = torch.full_like(param, math.nan)
    one.step()
    values = train(one, params, range(7))
    other.load_state_dict(through_file(one.state_dict()))
    with torch.no_grad():
        for param, value in zip(others, values, strict=True):
            param.copy_(value)
    for step in range(7, 16):
        wanted, got = train(one, params, range(step, step + 1)), train(other, others, range(step, step + 1))
        assert same(got, wanted)
        assert same(tuple(other.clipping.telemetry), tuple(one.clipping.telemetry))
    if name in ("threshold", "smooth"):
        assert float(one.clipping.telemetry.threshold) == pytest.approx(0.5)
    assert same(other.state_dict(), one.state_dict())


def test_a_threshold_travels_into_a_fused_kernel(path, parameters):
    params = parameters([3.0, 4.0])
    optimizer = clip(torch.optim.SGD(params, lr=1.0, fused=True), NormClip(Linear(4.0, 1.0, 3)))
    for k in range(5):
        with torch.no_grad():
            params[0].zero_()
        params[0].grad = torch.tensor([30.0, 40.0])
        optimizer.step()
        assert params[0].norm().item() == pytest.approx(max(4.0 - k, 1.0))


@pytest.mark.parametrize("name", SCHEDULED)
def test_several_devices(name):
    """The value of a schedule is where the first gradient is; the others are elsewhere."""
    clipping = SCHEDULED[name]()
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.ones(3, 2, device=d)) for d in ("cuda:0", "cuda:1", "cuda:0")]
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            said = clipping.clip_(params)
        assert [str(param.grad.device) for param in params] == ["cuda:0", "cuda:1", "cuda:0"]
        assert str(said.threshold.device) == "cuda:0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SCHEDULED)
def test_gradients_keep_their_dtype(path, parameters, name, dtype):
    clipping = SCHEDULED[name]()
    for _ in range(3):
        params = parameters([[30.0, 4.0], [1.0, 2.0]], [5.0], dtype=dtype)
        said = clipping.clip_(params)
        assert all(param.grad.dtype is dtype for param in params)
        assert float(said.clip_coef) <= 1.5
