"""Percentiles of windows of several units: what bitsandbytes' users lost, and every scope besides."""

import io
import math

import numpy as np
import pytest
import torch

from torch_clip import Clipping, clip
from torch_clip.methods import AutoClip, LayerWiseAutoClip
from torch_clip.scopes import PerGroup, PerModule, PerTensor, PerUnit
from torch_clip.thresholds import Percentile

WINDOW = 6


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def of_norms(norms, dtype=torch.float64):
    """Parameters whose gradients have these norms; None has none."""
    params = []
    for norm in norms:
        params.append(torch.nn.Parameter(torch.ones(2, dtype=dtype)))
        if norm is not None:
            params[-1].grad = torch.tensor([0.6 * norm, 0.8 * norm], dtype=dtype)
    return params


def norms_after(clipping, norms, dtype=torch.float64):
    params = of_norms(norms, dtype)
    said = clipping.clip_(params)
    return [None if p.grad is None else p.grad.double().norm().item() for p in params], said


def heavy_tailed_norms(count, tensors, seed=0):
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_t(2, (count, tensors))) * 10.0 ** np.arange(tensors) + 1e-3


@pytest.mark.parametrize("percentile", [0.05, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_each_tensor_by_its_own_last_norms(path, percentile, window):
    clipping = LayerWiseAutoClip(percentile, window)
    stream = heavy_tailed_norms(130 if window == 100 else 40, 4)
    for k, norms in enumerate(stream):
        after, said = norms_after(clipping, norms.tolist())
        thresholds = np.quantile(stream[max(0, k + 1 - window) : k + 1], percentile, axis=0)
        assert after == pytest.approx(np.minimum(norms, thresholds), rel=1e-12)
        assert float(said.threshold) == pytest.approx(sorted(thresholds)[1])  # torch's median
        # Of equal norms the quantile may lie below by a rounding error.
        assert float(said.clipped) * 4 >= (norms > thresholds * (1 + 1e-12)).sum()
    assert clipping.unit == "tensors"


def test_nothing_is_compared_with_zeros_at_the_start(path):
    # C8: unfilled places of the ring are no norms; there the first steps had a threshold of 0.
    clipping = LayerWiseAutoClip(percentile=0.05, window=100)
    after, said = norms_after(clipping, [3.0, 400.0])
    assert after == pytest.approx([3.0, 400.0])
    assert (float(said.clip_coef), float(said.clipped)) == (1.0, 0.0)
    for norm in (2.0, 1.0, 5.0):
        after, _ = norms_after(clipping, [norm, 100 * norm])
        assert min(after) >= 1.0


def test_worked_value(path):
    """bitsandbytes' percentile 5 of norms 1 to 100 is the one at place 5, which is 6."""
    clipping = LayerWiseAutoClip(percentile=5 / 99, window=100)
    for norm in range(100, 0, -1):
        norms_after(clipping, [float(norm), 1.0])
    history = clipping.threshold.history
    assert history.shape == (2, 100)
    assert history[0].tolist() == pytest.approx(list(range(100, 0, -1)))
    assert float(np.quantile(history[0], 5 / 99)) == pytest.approx(6.0)
    # 100 leaves the window as 50 comes: the threshold is that of 1, ..., 99 and 50.
    after, _ = norms_after(clipping, [50.0, 1.0])
    assert after[0] == pytest.approx(6.0)
    assert after[1] == pytest.approx(1.0)


def test_a_tensor_with_a_gradient_in_some_steps(path):
    """Steps without say nothing: its window holds its own last norms, however old."""
    clipping = LayerWiseAutoClip(0.5, WINDOW)
    rng, seen = np.random.default_rng(1), [[], [], []]
    for k, row in enumerate(heavy_tailed_norms(80, 3).tolist()):
        row = [
            norm if i == 0 or rng.random() < 0.4 else (None, 0.0, math.nan)[(k + i) % 2]
            for i, norm in enumerate(row)
        ]
        after, _ = norms_after(clipping, row)
        for norm, got, own in zip(row, after, seen, strict=True):
            if norm:
                own.append(norm)
                assert got == pytest.approx(min(norm, np.quantile(own[-WINDOW:], 0.5)), rel=1e-12)
            else:
                assert got == norm
    for own, history in zip(seen, clipping.threshold.history, strict=True):
        assert history.tolist() == pytest.approx(own[-WINDOW:])


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_a_step_that_is_not_finite_is_recorded_of_no_tensor(path, nonfinite):
    clean, spoilt = (LayerWiseAutoClip(0.5, WINDOW, nonfinite=nonfinite) for _ in range(2))
    for k, row in enumerate(heavy_tailed_norms(30, 3).tolist()):
        if k % 4 == 0:
            norms_after(spoilt, [row[0], (math.nan, math.inf)[k % 8 // 4], row[2]])
        assert norms_after(spoilt, row)[0] == norms_after(clean, row)[0]
    assert torch.equal(spoilt.threshold.history, clean.threshold.history)


@pytest.mark.parametrize("before", [0, 3, 6, 20])
@pytest.mark.parametrize("window", [2, 6, 9])
def test_windows_of_another_size_when_loading(path, window, before):
    stream = heavy_tailed_norms(60, 3)
    one, other = LayerWiseAutoClip(0.3, WINDOW), LayerWiseAutoClip(0.3, window)
    for norms in stream[:before]:
        norms_after(one, norms.tolist())
    other.load_state_dict(through_file(one.state_dict()))
    seen = list(stream[max(0, before - min(WINDOW, window)) : before])
    for norms in stream[before:]:
        seen.append(norms)
        after, _ = norms_after(other, norms.tolist())
        thresholds = np.quantile(seen[-window:], 0.3, axis=0)
        assert after == pytest.approx(np.minimum(norms, thresholds), rel=1e-12)


def test_windows_of_unlike_fill_when_loading(path):
    """Tensors that have had 1, 4 and 9 norms: what is kept is the last ones of each."""
    one = LayerWiseAutoClip(0.5, WINDOW)
    for k in range(9):
        norms_after(one, [1.0 + k, 10.0 + k if k >= 5 else None, 100.0 if k == 0 else 0.0])
    for window in (3, 6, 20):
        other = LayerWiseAutoClip(0.5, window)
        other.load_state_dict(through_file(one.state_dict()))
        after, _ = norms_after(other, [1e6, 1e6, 1e6])
        kept = [[4.0, 5, 6, 7, 8, 9], [15.0, 16, 17, 18][-window:], [100.0]]
        wanted = [np.median([*own[-window:], 1e6][-window:]) for own in kept]
        assert after == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("after", [0, 1, 5, 6, 17])
def test_resuming_through_a_file(path, same, after):
    one, other = LayerWiseAutoClip(0.3, WINDOW), LayerWiseAutoClip(0.3, WINDOW)
    stream = heavy_tailed_norms(40, 3).tolist()
    for norms in stream[:after]:
        norms_after(one, norms)
    other.load_state_dict(through_file(one.state_dict()))
    for norms in stream[after:]:
        wanted, got = norms_after(one, norms), norms_after(other, norms)
        assert got[0] == wanted[0]
        assert same(tuple(got[1]), tuple(wanted[1]))
    # In order of time, though the ring may begin elsewhere.
    assert same(other.state_dict(), one.state_dict())


def test_a_state_of_one_path_goes_on_on_the_other(device_path):
    one, stream = LayerWiseAutoClip(0.3, WINDOW), heavy_tailed_norms(40, 3).tolist()
    for norms in stream[:15]:
        norms_after(one, norms)
    state = through_file(one.state_dict())
    wanted = [norms_after(one, norms)[0] for norms in stream[15:]]
    device_path()
    other = LayerWiseAutoClip(0.3, WINDOW)
    other.load_state_dict(state)
    got = [norms_after(other, norms)[0] for norms in stream[15:]]
    assert got == [pytest.approx(row, rel=1e-12) for row in wanted]


def test_tensors_added_later_and_fewer(path, parameters):
    first, second = parameters([1.0], [1.0])
    optimizer = clip(torch.optim.SGD([first], lr=0.0), LayerWiseAutoClip(0.5, WINDOW))
    seen = [[], []]
    for k, norms in enumerate(heavy_tailed_norms(25, 2).tolist()):
        if k == 10:
            optimizer.add_param_group({"params": [second]})
        params = [first, second][: 1 + (k >= 10)]
        for param, norm in zip(params, norms, strict=False):
            param.grad = torch.tensor([norm])
        optimizer.step()
        for param, norm, own in zip(params, norms, seen, strict=False):
            own.append(norm)
            assert param.grad.item() == pytest.approx(min(norm, np.quantile(own[-WINDOW:], 0.5)), rel=1e-5)
    with pytest.raises(ValueError, match="2 units are remembered, and 1 came: give the same parameters"):
        optimizer.clipping.clip_([first])


SCOPES = {
    "PerGroup": (PerGroup, [[0, 1], [2, 3]]),
    "PerModule": (PerModule, [[0, 1], [2, 3]]),
    "PerTensor": (PerTensor, [[0], [1], [2], [3]]),
    "PerUnit": (PerUnit, None),
}


def units_of(name, params):
    """The gradients of each unit, views of them."""
    if name == "PerUnit":
        return [[row] for p in params for row in (p.grad if p.ndim > 1 else [p.grad])]
    return [[params[i].grad for i in unit] for unit in SCOPES[name][1]]


def length(unit):
    return math.sqrt(sum(float(grad.square().sum()) for grad in unit))


@pytest.mark.parametrize("name", SCOPES)
def test_every_scope_has_windows(path, name):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)).double()
    params, rng = list(net.parameters()), torch.Generator().manual_seed(0)
    named = list(net.named_parameters())
    optimizer = torch.optim.SGD([{"params": named[:2]}, {"params": named[2:]}], lr=0.0)
    clip(optimizer, Clipping(SCOPES[name][0](), Percentile(0.5, WINDOW)))
    history = []
    for step in range(20):
        for i, param in enumerate(params):
            noise = torch.randn(param.shape, generator=rng, dtype=torch.float64)
            param.grad = noise * 10.0 ** ((step + i) % 3)
        before = [[grad.clone() for grad in unit] for unit in units_of(name, params)]
        history.append([length(unit) for unit in before])
        optimizer.step()
        for unit, was, norms in zip(
            units_of(name, params), before, zip(*history[-WINDOW:], strict=True), strict=True
        ):
            coef = min(1.0, np.quantile(norms, 0.5) / norms[-1])
            for grad, old in zip(unit, was, strict=True):
                torch.testing.assert_close(grad, old * coef, rtol=1e-12, atol=0)
    assert optimizer.clipping.threshold.history.shape == (len(history[0]), WINDOW)


def test_one_unit_has_a_window_as_before(path):
    auto = AutoClip(0.5, WINDOW)
    for norm in heavy_tailed_norms(20, 1)[:, 0].tolist():
        norms_after(auto, [norm])
    assert auto.threshold.history.shape == (WINDOW,)
