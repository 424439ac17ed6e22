"""The eight methods: worked values, and formulas in float64 NumPy."""

import inspect
import re

import numpy as np
import pytest
import torch

from torch_clip import CLIPPINGS, gates
from torch_clip.clipping import Clipping
from torch_clip.gates import RandomGate, uniform
from torch_clip.methods import (
    AutoClip,
    CoordWiseClip,
    LayerWiseClip,
    LinearRandAutoClip,
    LinearRandNormClip,
    NormClip,
    QuadraticRandAutoClip,
    QuadraticRandNormClip,
)
from torch_clip.scopes import Element, Global, PerTensor
from torch_clip.thresholds import Constant, Percentile

STEPS = 40
TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=1e-8), torch.float64: dict(rtol=1e-12, atol=0)}


def clipped(clipping, params):
    clipping.clip_(params)
    return [param.grad.tolist() for param in params]


# Worked values.


def test_norm_clip_worked_values(parameters):
    assert clipped(NormClip(1.0), parameters([3.0], [4.0])) == [[pytest.approx(0.6)], [pytest.approx(0.8)]]
    # Not shortened at the threshold itself, as the 1e-6 in torch's denominator would.
    assert clipped(NormClip(5.0), parameters([3.0], [4.0])) == [[3.0], [4.0]]
    assert clipped(NormClip(10), parameters([3.0], [4.0])) == [[3.0], [4.0]]
    assert clipped(NormClip(0), parameters([3.0], [4.0])) == [[0.0], [0.0]]


def test_layer_wise_worked_values(parameters):
    first, second = clipped(LayerWiseClip(1), parameters([3.0, 4.0], [0.3, 0.4]))
    assert first == pytest.approx([0.6, 0.8])
    assert second == torch.tensor([0.3, 0.4]).tolist()


def test_coordinate_wise_worked_values(parameters):
    # Exactly the threshold: no epsilon in a denominator (B18).
    params = parameters([3.0, -0.5, 1e-9], dtype=torch.float64)
    assert clipped(CoordWiseClip(1), params) == [[1.0, -0.5, 1e-9]]
    infinite = parameters([torch.inf, -torch.inf])
    assert clipped(CoordWiseClip(1, nonfinite="propagate"), infinite) == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("percentile", "thresholds", "coefs"),
    [
        (0.5, [4, 2.5, 3, 2.5, 3], [1, 1, 1, 1, 0.3]),
        (0.1, [4, 1.3, 1.4, 1.3, 1.4], [1, 1, 1.4 / 3, 0.65, 0.14]),
        (1.0, [4, 4, 4, 4, 10], [1, 1, 1, 1, 1]),
    ],
)
def test_auto_clip_worked_values(parameters, percentile, thresholds, coefs):
    clipping = AutoClip(percentile)
    done = [clipping.clip_(parameters([norm])) for norm in (4.0, 1.0, 3.0, 2.0, 10.0)]
    assert [t.threshold for t in done] == pytest.approx(thresholds)
    assert [t.clip_coef for t in done] == pytest.approx(coefs)


@pytest.mark.parametrize(
    ("power", "beta", "coef", "probability"),
    [
        (1, 0.85, 0.2, 0.96802),
        (1, 0.5, 0.2, 0.87055),
        (1, 0.85, 0.8, 0.87808),
        (2, 0.85, 0.2, 0.99352),
        (2, 0.5, 0.2, 0.97265),
        (2, 0.85, 0.8, 0.90121),
    ],
)
def test_gate_probability_worked_values(power, beta, coef, probability):
    assert RandomGate(beta, power).probability(coef) == pytest.approx(probability, abs=6e-6)


@pytest.mark.parametrize(
    ("clipping", "below", "above"),
    [
        (LinearRandNormClip(1.0, 0.85), 0.96, 0.97),
        (QuadraticRandNormClip(1.0, 0.85), 0.9935, 0.9936),
        (LinearRandAutoClip(0.5, 0.85), 0.96, 0.97),
        (QuadraticRandAutoClip(0.5, 0.85), 0.9935, 0.9936),
    ],
)
def test_random_methods_worked_values(parameters, monkeypatch, clipping, below, above):
    for _ in range(4):
        clipping.clip_(parameters([1.0]))  # the history of the auto methods; with 5 the median is 1
    for draw, coef in ((below, 0.2), (above, 1.0)):
        monkeypatch.setattr(gates, "uniform", lambda seed, step, draw=draw: draw)
        params = parameters([3.0], [4.0])
        assert clipping.clip_(params).clip_coef == pytest.approx(coef)
        assert [p.grad.item() for p in params] == pytest.approx([3 * coef, 4 * coef])
        clipping.clip_(parameters([1.0]))
        clipping.clip_(parameters([1.0]))


# Formulas.


def numpy_clip(name, steps, level, percentile, beta):
    """The gradients of all steps after ``name``'s formula; ``uniform`` gives the coins."""
    history, out = [], []
    for k, grads in enumerate(steps):
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        history.append(norm)
        threshold = np.quantile(history, percentile) if "auto" in name else level
        alpha = min(1.0, threshold / norm)
        power = 2 if "quadratic" in name else 1
        if name == "no_clip" or ("rand" in name and not uniform(0, k) < beta ** (alpha**power)):
            out.append(grads)
        elif name == "layer_wise":
            out.append([min(1.0, level / np.sqrt((g**2).sum())) * g for g in grads])
        elif name == "coordinate_wise":
            out.append([np.sign(g) * np.minimum(np.abs(g), level) for g in grads])
        else:
            out.append([alpha * g for g in grads])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("percentile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", list(CLIPPINGS)[:9])  # the others have files of their own
def test_methods_follow_their_formula(heavy_tailed, parameters, name, percentile, dtype):
    method = CLIPPINGS[name]
    # Thresholds that clip some of the steps, tensors and elements, and not all of them.
    level = {"layer_wise": 5.0, "coordinate_wise": 1.0}.get(name, 100.0)
    settings = {"threshold": level, "percentile": percentile, "beta": 0.5}
    known = inspect.signature(method).parameters
    clipping = method(**{key: value for key, value in settings.items() if key in known})
    steps = heavy_tailed(0, STEPS, dtype, long=True)
    expected = numpy_clip(
        name, [[g.double().numpy() for g in grads] for grads in steps], level, percentile, 0.5
    )
    shortened = 0
    for grads, wanted in zip(steps, expected, strict=True):
        params = parameters(*grads)
        shortened += clipping.clip_(params).clip_coef < 1
        for param, want in zip(params, wanted, strict=True):
            np.testing.assert_allclose(param.grad.double().numpy(), want, **TOLERANCE[dtype])
    assert shortened == 0 if name == "no_clip" else 0 < shortened < STEPS


@pytest.mark.parametrize(("name", "power"), [("linear_rand", 1), ("quadratic_rand", 2)])
def test_random_methods_with_beta_one_are_the_plain_ones(heavy_tailed, parameters, name, power):
    pairs = [("norm", f"{name}_norm"), ("auto_clip", f"{name}_autoclip")]
    for plain, random in pairs:
        one, other = CLIPPINGS[plain](), CLIPPINGS[random](beta=1)
        for grads in heavy_tailed(3, 20):
            assert clipped(one, parameters(*grads)) == clipped(other, parameters(*grads))


# Construction.


def test_defaults():
    # B4, B7, B12: each default is reachable and clips.
    for name, method in list(CLIPPINGS.items())[:9]:  # the original's
        clipping = method()
        if isinstance(clipping.threshold, Percentile):
            assert clipping.threshold.percentile == 0.75
        elif name != "no_clip":
            assert clipping.threshold.value == (0.1 if name == "coordinate_wise" else 1.0)
        if isinstance(clipping.gate, RandomGate):
            assert clipping.gate.beta == 0.85
            assert clipping.gate.power == (2 if name.startswith("quadratic") else 1)
        assert clipping.nonfinite == "skip"
        assert type(clipping).__doc__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoClip(percentile=75), "percentile must be in (0, 1], got 75; for the 75th percentile"),
        (lambda: AutoClip(percentile=0), "percentile must be in (0, 1], got 0"),
        (lambda: AutoClip(percentile=float("nan")), "percentile must be in (0, 1], got nan"),
        (lambda: AutoClip(window=0), "window must be a whole number from 1, got"),
        (lambda: AutoClip(window=2.5), "got 2.5"),
        (lambda: LinearRandNormClip(beta=0), "beta must be in (0, 1], got 0"),  # B7
        (lambda: QuadraticRandAutoClip(beta=7), "beta must be in (0, 1], got 7"),
        (lambda: NormClip(-1), "threshold must be in [0, inf], got -1"),
        (lambda: CoordWiseClip(float("nan")), "threshold must be in [0, inf], got nan"),
        (
            lambda: NormClip(1.0, nonfinite="skpi"),
            "nonfinite must be one of skip, propagate, error, got 'skpi'",
        ),
        (lambda: Clipping(PerTensor(), Percentile(0.5)), "would keep every norm of each unit; give a window"),
        (
            lambda: Clipping(Element(), Constant(1.0), RandomGate(0.5, 1)),
            "with scope Element() use Always",
        ),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_an_unknown_setting_is_refused():
    # B14: nothing swallows a misspelt keyword.
    for method in CLIPPINGS.values():
        with pytest.raises(TypeError, match="treshold"):
            method(treshold=1.0)


@pytest.mark.parametrize("level", [5, np.float32(5), np.float64(5), np.int64(5), 5.0])
def test_a_threshold_is_any_real_number(parameters, level):
    # B3: an integer is not replaced by a default.
    assert NormClip(level).clip_(parameters([30.0, 40.0])).threshold == 5.0


def test_repr_says_the_parts():
    assert repr(NormClip(2)) == "NormClip(Global(), Constant(2), Always(), nonfinite='skip')"
    assert "Percentile(0.5, window=3)" in repr(AutoClip(0.5, 3))
    assert "RandomGate(beta=0.5, power=2)" in repr(QuadraticRandNormClip(1.0, 0.5))


def test_a_clipping_is_put_together_from_parts(parameters):
    # Per-tensor norms with one coin for all of them: one draw decides, though probabilities differ.
    clipping = Clipping(PerTensor(), Constant(1.0), RandomGate(0.5, 1))
    for step in range(20):
        params = parameters([3.0, 4.0], [0.3, 0.4], [6.0, 8.0])
        clipping.clip_(params)
        draw = uniform(0, step)
        wanted = [n if n <= 1 or draw >= 0.5 ** (1 / n) else 1.0 for n in (5.0, 0.5, 10.0)]
        assert [p.grad.norm().item() for p in params] == pytest.approx(wanted)
    assert Clipping(Global(), Constant(1.0)).unit == "steps"


def test_nothing_is_printed(heavy_tailed, parameters, capsys):
    # B5
    for method in CLIPPINGS.values():
        clipping = method()
        for grads in heavy_tailed(0, 3):
            clipping.clip_(parameters(*grads))
    assert capsys.readouterr() == ("", "")
