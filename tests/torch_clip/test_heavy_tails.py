"""Who claims to handle heavy tails does: a quadratic under Student-t(1.5) noise, and a Gaussian control.

20 dimensions, curvature 0.1 to 1, SGD at lr 0.03 from x = 1; the mean of the last 200 losses, paired by seed
with no clipping. The rule: median at least 3 times and 95th percentile at least 6 times better, better on
90 % of the seeds; under Gaussian noise at most 1.1 times the median of no clipping.
"""

import functools

import numpy as np
import pytest
import torch

from torch_clip import CLIPPINGS, clip
from torch_clip.clipping import Clipping
from torch_clip.methods import AGC, NoClip, SpamClip, UClip
from torch_clip.scopes import Global
from torch_clip.thresholds import Constant

CURVATURE = torch.linspace(0.1, 1.0, 20)

# Those that cannot claim it by their nature, and why; of some a setting that can.
NOT_CLAIMED = {
    "no_clip": "clips nothing",
    "agc": "its threshold follows the weights, which are to become 0 here: it stops short of that",
    "uclip": "gives back all that it cuts off",
    "spam": "made for large models: lets through what is below 70 times an element's root mean square",
}
CLAIMED = {
    **{name: make for name, make in CLIPPINGS.items() if name not in NOT_CLAIMED},
    "agc at the norm of the weights": functools.partial(AGC, 1.0, exclude=None),
    "uclip with decay": functools.partial(UClip, 0.1, decay=0.5),
    "spam at three times": functools.partial(SpamClip, theta=9.0, warmup=20),
}


class PlantedNoOp(Clipping):
    """Says that it clips, and does not."""

    def __init__(self):
        super().__init__(Global(), Constant(1.0))

    def coef(self, measured):
        return 1.0

    def apply_(self, grads, measured):
        return 1.0, 0.0, measured.shown


def losses(make, noise, seeds, steps):
    """Mean of the last 200 losses, one a seed."""
    means = []
    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        size = (steps, len(CURVATURE))
        drawn = rng.standard_t(1.5, size) if noise == "student" else rng.standard_normal(size)
        drawn = torch.tensor(0.3 * drawn, dtype=torch.float32)
        param = torch.nn.Parameter(torch.ones(len(CURVATURE)))
        param.grad = torch.empty_like(param)
        optimizer = clip(torch.optim.SGD([param], lr=0.03), make())
        last = []
        for step, xi in enumerate(drawn):
            x = param.detach()
            if step >= steps - 200:
                last.append(0.5 * (CURVATURE * x * x).sum())
            torch.addcmul(xi, CURVATURE, x, out=param.grad)
            optimizer.step()
        means.append(float(torch.stack(last).mean()))
    return np.array(means)


@functools.cache
def unclipped(noise, seeds, steps):
    return losses(NoClip, noise, seeds, steps)


def verdict(make, seeds, steps):
    """What of the rule does not hold."""
    tail, none = losses(make, "student", seeds, steps), unclipped("student", seeds, steps)
    gauss, control = losses(make, "gaussian", seeds, steps), unclipped("gaussian", seeds, steps)
    found = {
        "median": np.median(none) / np.median(tail),
        "p95": np.quantile(none, 0.95) / np.quantile(tail, 0.95),
        "wins": np.mean(tail < none),
        "gaussian": np.median(gauss) / np.median(control),
    }
    bad = found["median"] < 3, found["p95"] < 6, found["wins"] < 0.9, found["gaussian"] > 1.1
    return {name: round(float(found[name]), 3) for name, missed in zip(found, bad, strict=True) if missed}


FULL = tuple(range(20)), 2000


@pytest.mark.parametrize("name", CLAIMED)
def test_heavy_tails_in_short(name):
    assert holds_in_short(CLAIMED[name])


def test_a_planted_no_op_fails_in_short():
    assert not holds_in_short(PlantedNoOp)


def holds_in_short(make):
    """One seed: three times as good, and no worse under Gaussian noise."""
    one = (1,), 2000
    tail, none = losses(make, "student", *one), unclipped("student", *one)
    gauss, control = losses(make, "gaussian", *one), unclipped("gaussian", *one)
    return bool(none > 3 * tail and gauss <= 1.1 * control)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMED)
def test_heavy_tails(name):
    assert verdict(CLAIMED[name], *FULL) == {}


@pytest.mark.slow
def test_a_planted_no_op_fails():
    assert verdict(PlantedNoOp, *FULL) == {"median": 1.0, "p95": 1.0, "wins": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_CLAIMED)
def test_what_is_not_claimed_does_not_hold(name):
    """A method that could claim it should: the list above is no place to hide a failure."""
    assert verdict(CLIPPINGS[name], *FULL)
