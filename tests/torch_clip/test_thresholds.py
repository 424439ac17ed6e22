"""The percentile of the history: numpy.quantile to the last bit, on the host and in device tensors."""

import io
import math

import numpy as np
import pytest
import torch

from torch_clip import CLIPPINGS, NonFiniteGradientError
from torch_clip.histories import HostHistory, SortedHistory, WindowHistory
from torch_clip.methods import AutoClip
from torch_clip.thresholds import Moment, Percentile

PERCENTILES = [0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]


def heavy_tailed_norms(count, seed=0):
    norms = np.abs(np.random.default_rng(seed).standard_t(2, count)) + 1e-9
    norms[count // 2 :: 7] = norms[3]  # equal norms, too
    return norms


def update(rule, norm):
    return rule.update(norm, Moment(step=0, total=norm, finite=True, weights=None))


def as_number(norm, device):
    return torch.tensor(norm, dtype=torch.float64) if device else float(norm)


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("percentile", PERCENTILES)
def test_percentile_is_numpys(percentile, window, device):
    # B8: an order statistic, whatever was seen in between.
    rule = Percentile(percentile, window)
    norms = heavy_tailed_norms(200)
    for k, norm in enumerate(norms):
        seen = norms[: k + 1] if window is None else norms[max(0, k + 1 - window) : k + 1]
        assert float(update(rule, as_number(norm, device))) == np.quantile(seen, percentile)


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "norms",
    [np.arange(1.0, 2000.0), np.arange(2000.0, 1.0, -1), np.linspace(50, 1, 500) ** 2],
    ids=["rising", "falling", "drifting"],
)
def test_percentile_of_a_trend(norms, device):
    # B8. Rising norms also make the device buffer grow past its first 1024 places.
    rule = Percentile(0.5)
    for norm in norms:
        threshold = update(rule, as_number(norm, device))
    assert float(threshold) == np.quantile(norms, 0.5)


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("window", [None, 3])
def test_only_finite_norms_above_zero_are_recorded(window, device):
    # B13, B16: a NaN must not break the order, a zero of a group without gradients must not lower it.
    rule = Percentile(0.5, window)
    assert float(update(rule, as_number(0.0, device))) == math.inf
    for norm in (math.nan, 1.0, math.inf, 3.0, 0.0, -math.inf, 2.0, math.nan):
        threshold = update(rule, as_number(norm, device))
    assert float(threshold) == 2.0
    assert sorted(rule.history.tolist()) == [1.0, 2.0, 3.0]
    assert float(update(rule, as_number(10.0, device))) == (2.5 if window is None else 3.0)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("before", [0, 3, 40])
def test_history_moves_between_devices(window, before):
    """Saved on one device, continued on another, and a model moved to and fro: the same thresholds."""
    norms = heavy_tailed_norms(before + 60)
    straight, moving = Percentile(0.3, window), Percentile(0.3, window)
    for k, norm in enumerate(norms):
        if k == before:
            file = io.BytesIO()
            torch.save(moving.state_dict(), file)
            file.seek(0)
            moving = Percentile(0.3, window)
            moving.load_state_dict(torch.load(file, weights_only=True))
        got = update(moving, as_number(norm, device=k // 3 % 2))
        assert float(got) == update(straight, float(norm))
    assert moving.history.tolist() == straight.history.tolist()
    moving.reset()
    assert len(moving.history) == 0
    assert update(moving, 7.0) == 7.0


def test_history_takes_eight_bytes_a_norm():
    # B9: numbers, not tensors; what is saved is a copy without the room kept for growth.
    rule = Percentile(0.5)
    for norm in heavy_tailed_norms(300):
        update(rule, float(norm))
    assert rule._history.sorted.itemsize == 8
    saved = rule.state_dict()["history"]
    assert saved.untyped_storage().nbytes() == 8 * 300
    update(rule, 1e9)  # the array may move now
    assert saved.max() < 1e9

    windowed = Percentile(0.5, window=10)
    for norm in heavy_tailed_norms(300):
        update(windowed, float(norm))
    assert len(windowed.history) == len(windowed._history.sorted) == 10


def test_only_the_auto_methods_keep_a_history(heavy_tailed, parameters):
    # B9
    for name, method in CLIPPINGS.items():
        clipping = method()
        for grads in heavy_tailed(0, 5):
            clipping.clip_(parameters(*grads))
        kept = {"layer_wise_autoclip": 3}.get(name, 5 if "auto" in name else 0)  # a history of each tensor
        assert len(clipping.state_dict().get("history", [])) == kept


def test_history_holds_the_norms_before_clipping(parameters):
    clipping = AutoClip(0.1)
    for norm in (4.0, 1.0, 3.0):
        clipping.clip_(parameters([norm]))
    assert clipping.threshold.history.tolist() == [1.0, 3.0, 4.0]


def test_history_is_untouched_by_an_error(parameters):
    clipping = AutoClip(0.5, nonfinite="error")
    clipping.clip_(parameters([1.0]))
    with pytest.raises(NonFiniteGradientError):
        clipping.clip_(parameters([torch.nan]))
    assert clipping.threshold.history.tolist() == [1.0]


def test_device_tensors_keep_their_place_when_reserved():
    """What a captured CUDA graph needs: no allocation of state between steps."""
    for window in (None, 50):
        rule = Percentile(0.5, window)
        rule.reserve(3000, "cpu")
        update(rule, torch.tensor(1.0))
        history = rule._history
        assert isinstance(history, SortedHistory if window is None else WindowHistory)
        places = [value.data_ptr() for value in vars(history).values() if isinstance(value, torch.Tensor)]
        for norm in heavy_tailed_norms(1500):
            update(rule, torch.tensor(norm))
        assert rule._history is history
        assert places == [v.data_ptr() for v in vars(history).values() if isinstance(v, torch.Tensor)]


def test_a_cpu_norm_is_kept_on_the_host():
    rule = Percentile(0.5)
    update(rule, 1.0)
    assert isinstance(rule._history, HostHistory)
    assert update(rule, torch.tensor(2.0)).dtype is torch.float32
    assert isinstance(rule._history, SortedHistory)


def test_a_history_without_order_is_not_taken_for_a_window():
    whole = Percentile(0.5)
    for norm in (3.0, 1.0, 2.0, 5.0):
        update(whole, norm)
    with pytest.raises(ValueError, match="no order of time; window=2"):
        Percentile(0.5, window=2).load_state_dict(whole.state_dict())
    roomy = Percentile(0.5, window=10)
    roomy.load_state_dict(whole.state_dict())
    assert update(roomy, 4.0) == 3.0
