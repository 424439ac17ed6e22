"""ClippedSGD: the settings of TorchClippedOptimizers on torch's own SGD."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch

from torch_clip import CLIPPINGS, ClippedAdam, ClippedAdamW, ClippedSGD, clip
from torch_clip.gates import RandomGate
from torch_clip.methods import AutoClip, NormClip
from torch_clip.optimizers import make_clipping
from torch_clip.thresholds import Percentile


@pytest.mark.parametrize("name", CLIPPINGS)
def test_every_type_by_name(name, train, weights):
    one, other = weights(), weights()
    clipped = ClippedSGD(one, lr=0.1, momentum=0.9, clipping_type=name)
    assert type(clipped.clipping) is CLIPPINGS[name]
    plain = clip(torch.optim.SGD(other, lr=0.1, momentum=0.9), CLIPPINGS[name]())
    assert all(map(torch.equal, train(clipped, one, range(6)), train(plain, other, range(6))))


@pytest.mark.parametrize("level", [1, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_a_level_is_any_real_number(level, parameters):
    # B3: the README's own example, layer_wise with clipping_level=1, clips at 1.
    params = parameters([3.0, 4.0])
    ClippedSGD(params, lr=1.0, clipping_type="layer_wise", clipping_level=level).step()
    torch.testing.assert_close(params[0].detach(), torch.tensor([0.4, 0.2]))


def test_defaults_are_reachable(parameters):
    # B4, B7, B12: None is the type's default, and so is leaving a setting out.
    for settings in ({}, dict(clipping_level=None, p_autoclip=None, beta=None)):
        for name in list(CLIPPINGS)[:9]:  # the original's
            clipping = ClippedSGD(parameters([1.0]), clipping_type=name, **settings).clipping
            if isinstance(clipping.threshold, Percentile):
                assert clipping.threshold.percentile == 0.75
            else:
                wanted = {"coordinate_wise": 0.1, "no_clip": math.inf}.get(name, 1.0)
                assert clipping.threshold.value == wanted
            assert not isinstance(clipping.gate, RandomGate) or clipping.gate.beta == 0.85
    assert isinstance(ClippedSGD(parameters([1.0])).clipping, NormClip)


def test_settings_arrive(parameters):
    settings = dict(clipping_type="quadratic_rand_autoclip", p_autoclip=0.25, beta=0.5, clipping_level=9)
    clipping = ClippedSGD(parameters([1.0]), **settings).clipping
    assert (clipping.threshold.percentile, clipping.gate.beta, clipping.gate.power) == (0.25, 0.5, 2)
    own = AutoClip(0.3)
    assert ClippedSGD(parameters([1.0]), clipping=own).clipping is own
    assert make_clipping("norm", 0).threshold.value == 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # B19: the type is named, not the learning rate.
        ({"clipping_type": "auto_clp"}, "got 'auto_clp'; did you mean 'auto_clip'?"),
        ({"clipping_type": 0.25}, "clipping_type must be one of no_clip, norm, linear_rand_norm"),
        ({"clipping_type": "linear_rand_norm", "beta": 0}, "beta must be in (0, 1], got 0"),  # B7
        ({"clipping_type": "auto_clip", "p_autoclip": 75}, "percentile must be in (0, 1], got 75"),
        ({"clipping_level": -1}, "threshold must be in [0, inf], got -1"),
        ({"momentum": -3}, "Invalid momentum value: -3"),  # B7
    ],
)
def test_a_wrong_setting_is_named(parameters, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ClippedSGD(parameters([1.0]), **wrong)


def test_unknown_keywords_are_refused(parameters):
    # B14: nothing is swallowed, and what torch's SGD knows is honoured.
    for keyword in ("momentun", "clip_type", "percentile"):
        with pytest.raises(TypeError, match=keyword):
            ClippedSGD(parameters([1.0]), **{keyword: 0.9})


@pytest.mark.parametrize(
    "settings",
    [
        dict(weight_decay=0.1),
        dict(momentum=0.9, nesterov=True),
        dict(momentum=0.9, dampening=0.5, maximize=True),
        dict(momentum=0.9, weight_decay=0.1, fused=True),
        dict(momentum=0.9, foreach=False),
        dict(differentiable=False),
    ],
)
def test_torchs_keywords_work(settings, train, weights):
    # B1, B14
    one, other = weights(), weights()
    plain = torch.optim.SGD(other, lr=0.1, **settings)

    def by_hand(*_):
        torch.nn.utils.clip_grad_norm_(other, 1.0)

    plain.register_step_pre_hook(by_hand)
    torch.testing.assert_close(
        train(ClippedSGD(one, lr=0.1, **settings), one, range(8)), train(plain, other, range(8)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_it_is_a_class_of_its_own(parameters):
    optimizer = ClippedSGD(parameters([1.0]), lr=0.5, clipping_type="auto_clip")
    assert isinstance(optimizer, ClippedSGD)
    assert isinstance(optimizer, torch.optim.SGD)
    assert repr(optimizer).startswith("ClippedSGD (")
    assert isinstance(copy.deepcopy(optimizer), ClippedSGD)
    assert isinstance(copy.deepcopy(optimizer).clipping, AutoClip)
    optimizer.step()
    assert optimizer.state_dict()["state"].get(0, {}) == {}  # B22: no empty buffer without momentum


def test_nothing_is_printed(parameters, capsys):
    # B5
    for name in CLIPPINGS:
        optimizer = ClippedSGD(parameters([3.0], [4.0]), clipping_type=name)
        optimizer.step()
        optimizer.step()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ClippedAdam, torch.optim.Adam), (ClippedAdamW, torch.optim.AdamW)]
)
def test_clipped_adams_are_torchs_with_clipping(ours, theirs):
    grads = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)) * 5
    finals = []
    for clipped in (True, False):
        param = torch.nn.Parameter(torch.ones(4))
        settings = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
        made = ours([param], clipping_level=2, **settings) if clipped else theirs([param], **settings)
        for grad in grads:
            param.grad = grad.clone()
            if not clipped:
                torch.nn.utils.clip_grad_norm_([param], 2.0)
            made.step()
        finals.append(param.detach())
        assert isinstance(made, theirs)
        assert pickle.loads(pickle.dumps(made)).param_groups[0]["betas"] == (0.8, 0.9)
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError):
        ours([param], momentun=0.9)


def test_coordinate_wise_counts_no_nan():
    # Large tensors are clamped in pieces, small ones at once: both pass NaN through and do not count it.
    for size in (10, 200_000):
        param = torch.nn.Parameter(torch.zeros(size))
        param.grad = torch.full((size,), float("nan"))
        param.grad[0] = 5.0
        told = CLIPPINGS["coordinate_wise"](1.0, nonfinite="propagate").clip_([param])
        assert told.clipped == pytest.approx(1 / size)
        assert param.grad[0] == 1.0
