"""ClippedSSTM against the hand-computed values and the three-sequence form of the papers."""

from __future__ import annotations

import copy
import math
from fractions import Fraction as F

import pytest
import torch
from torch import nn

from torch_clip import clip
from torch_clip.methods import AutoClip, LayerWiseClip, NormClip
from torch_clip.optimizers import ClippedSSTM
from torch_clip.sstm import SSTM


def weight(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=torch.float64))


def walk(optimizer: SSTM, param: nn.Parameter, steps: int) -> dict[str, list[float]]:
    """f(x) = x: where gradients are taken, z and y after each step, and the clipped gradient."""
    seen = {"x": [], "y": [], "z": [], "g": []}
    for _ in range(steps):
        seen["x"].append(param.item())
        param.grad = torch.ones_like(param)
        optimizer.step()
        seen["g"].append(param.grad.item())
        seen["z"].append(optimizer.state[param]["z"].item())
        optimizer.eval()
        seen["y"].append(param.item())
        optimizer.train()
    return seen


def fractions(text: str) -> list[float]:
    return [float(F(word)) for word in text.split()]


# B26: the first gradient counts. B30: the ratio bound. lr = 1 / a = 1, L = 1.
HAND = {
    "plain": (
        {},
        {"x": "1 1/2 -1/3 -29/20", "z": "1/2 -1/2 -2 -4", "y": "1/2 -1/6 -13/12 -9/4", "g": "1 1 1 1"},
    ),
    "clipped at B = 3/4": (
        {"clipping_type": "norm", "clipping_level": 0.75},
        {"x": "1 1/2 -1/8 -7/10", "z": "1/2 -1/4 -1 -7/4", "y": "1/2 0 -1/2 -1", "g": "1 3/4 1/2 3/8"},
    ),
    "of 2005.10785, clipped at B = 3/4": (
        {"clipping_type": "norm", "clipping_level": 0.75, "offset": 2},
        {"x": "1 1/4 -1/3 -7/8", "z": "1/4 -1/2 -5/4 -2", "y": "1/4 -1/5 -2/3 -8/7", "g": "3/4 1/2 3/8 3/10"},
    ),
    "ratio at most 1/2": (
        {"a_k_ratio_upper_bound": 0.5},
        {
            "x": "1 1/2 -1/3 -37/24 -157/48 -529/96",
            "y": "1/2 -1/6 -13/12 -61/24 -217/48 -673/96",
        },
    ),
}


@pytest.mark.parametrize("case", HAND)
def test_hand_computed_steps(case):
    settings, expected = HAND[case]
    param = weight()
    seen = walk(ClippedSSTM([param], 1.0, 1.0, **settings), param, len(expected["x"].split()))
    for name, text in expected.items():
        assert seen[name] == pytest.approx(fractions(text), abs=1e-12), name


def three_sequences(grad, x0, steps, *, lr, L, nu, rho, B):
    """The method as the papers write it, with y and z stored."""
    y, z, A, outputs = x0.clone(), x0.clone(), 0.0, []
    for k in range(steps):
        alpha = lr / (2 * L) * (k + 1) ** (2 * nu / (1 + nu))
        if rho < 1 and A / (A + alpha) > rho:
            A = rho * alpha / (1 - rho)
        x = (A * y + alpha * z) / (A + alpha)
        g = grad(x, k)
        g = g * min(1.0, B / alpha / g.norm().item())
        before = z
        z = z - alpha * g
        assert (z - before).norm() <= B * (1 + 1e-12)  # no step of z is longer than B
        y = (A * y + alpha * z) / (A + alpha)
        A += alpha
        outputs.append((x, y, z))
    return outputs


@pytest.mark.parametrize("nu", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rho", [1.0, 0.9, 0.99])
def test_one_buffer_is_the_three_sequences(nu, rho):
    # B24, B28, B29: state is kept by parameter, in two groups here, and one buffer is enough.
    torch.manual_seed(0)
    hessian = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    noise = torch.distributions.StudentT(1.5).sample((60, 6)).double()

    def grad(x, k):
        return hessian * x + noise[k]

    x0 = torch.ones(6, dtype=torch.float64)
    B = 0.05
    expected = three_sequences(grad, x0, 60, lr=0.5, L=1.0, nu=nu, rho=rho, B=B)
    params = [nn.Parameter(x0[:2].clone()), nn.Parameter(x0[2:].clone())]
    optimizer = SSTM([{"params": [p]} for p in params], 0.5, 1.0, nu, rho)
    clip(optimizer, NormClip(B))
    pointers = [param.data_ptr() for param in params]
    z_before = x0
    for k, (x, y, z) in enumerate(expected):
        torch.testing.assert_close(torch.cat([p.detach() for p in params]), x, rtol=1e-10, atol=1e-10)
        for param, part in zip(
            params, grad(torch.cat([p.detach() for p in params]), k).split([2, 4]), strict=True
        ):
            param.grad = part.clone()
        assert optimizer.step() is None  # B25
        z_now = torch.cat([optimizer.state[p]["z"] for p in params])
        torch.testing.assert_close(z_now, z, rtol=1e-10, atol=1e-10)
        assert (z_now - z_before).norm() <= B * (1 + 1e-9)
        z_before = z_now.clone()
        optimizer.eval()
        torch.testing.assert_close(torch.cat([p.detach() for p in params]), y, rtol=1e-9, atol=1e-9)  # B31
        optimizer.train()
    assert [param.data_ptr() for param in params] == pointers  # B27
    assert set(optimizer.state[params[0]]) == {"z"}


@pytest.mark.parametrize(("rho", "first"), [(0.9, 19), (0.99, 199)])
def test_ratio_bound_holds_from_the_first_step_that_needs_it(rho, first):
    # B30: A_k / A_{k+1} never passes the bound.
    param = weight()
    optimizer = SSTM([param], 1.0, 1.0, a_k_ratio_upper_bound=rho)
    group, active = optimizer.param_groups[0], None
    for k in range(first + 5):
        if k:
            ratio = group["A"] / (group["A"] + group["alpha"])
            assert ratio <= rho * (1 + 1e-12)
            unbounded = k / (k + 2)
            if active is None and ratio < unbounded - 1e-12:
                active = k
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert active == first


def test_threshold_schedule():
    # B32: the clipping's level is what is in use at `clipping_iter_start`, whatever it is.
    def made(**settings):
        param = weight()
        param.grad = torch.ones_like(param)
        return ClippedSSTM([param], 0.5, 2.0, clipping_type="norm", **settings)

    optimizer = made(clipping_iter_start=10)
    optimizer.param_groups[0]["k"] = 10
    assert optimizer.threshold_scale == pytest.approx(1.0)
    optimizer.param_groups[0]["k"] = 0
    alpha = 0.5 / (2 * 2.0)
    assert optimizer.threshold_scale * alpha == pytest.approx(1.375)  # B of the published example
    optimizer = made(clipping_level=7.0, clipping_iter_start=10)
    optimizer.param_groups[0]["k"] = 10
    assert optimizer.clipping.threshold.value * optimizer.threshold_scale == pytest.approx(7.0)
    # nu = 0: a constant threshold.
    optimizer = made(nu=0.0, clipping_iter_start=0)
    for k in (0, 5, 50):
        optimizer.param_groups[0]["k"] = k
        assert optimizer.threshold_scale == pytest.approx(1.0)


def test_a_scheduler_does_not_shift_the_threshold_schedule():
    param = weight()
    optimizer = ClippedSSTM(
        [param], 1.0, 1.0, clipping_type="norm", clipping_level=3.0, clipping_iter_start=5
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for k in range(6):
        param.grad = torch.full_like(param, 100.0)
        optimizer.step()
        scheduler.step()
        assert optimizer.clipping.telemetry.threshold == pytest.approx(3.0 * 6 / (k + 1))


def test_a_group_that_takes_no_step_has_no_say_in_the_threshold():
    active, idle = weight(), weight()
    optimizer = SSTM([{"params": [active]}, {"params": [idle], "lr": 1000.0}], 1.0, 1.0)
    clip(optimizer, NormClip(1.0))
    active.grad = torch.full_like(active, 5.0)
    optimizer.step()
    assert optimizer.clipping.telemetry.threshold == 2.0


def test_a_missing_gradient_is_a_zero_one():
    # B29: the grad set may change; y of a parameter that has none for a while is still the method's.
    outputs = []
    for missing in (None, 0.0):
        params = [weight(), weight()]
        optimizer = SSTM(params, 1.0, 1.0)
        for k in range(25):
            params[0].grad = torch.ones_like(params[0])
            params[1].grad = torch.ones_like(params[1]) if k < 5 or missing is not None else None
            if k >= 5 and missing is not None:
                params[1].grad.zero_()
            optimizer.step()
        optimizer.eval()
        outputs.append([param.item() for param in params])
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-12)


def test_clips_with_the_attached_method_and_reports_the_threshold_in_use():
    params = [weight(), weight(2.0)]
    optimizer = clip(SSTM(params, 1.0, 1.0), LayerWiseClip(0.75))
    for k in range(3):
        for param in params:
            param.grad = torch.full_like(param, 5.0)
        optimizer.step()
        threshold = 0.75 / ((k + 1) / 2)
        assert optimizer.clipping.telemetry.threshold == pytest.approx(threshold)
        assert [param.grad.item() for param in params] == pytest.approx([threshold] * 2)


def test_methods_without_a_settable_threshold_are_refused_by_name():
    with pytest.raises(ValueError, match="SSTM schedules the threshold, and AutoClip finds its own"):  # B34
        clip(SSTM([weight()], 1.0, 1.0), AutoClip())
    with pytest.raises(ValueError, match="QuadraticRandAutoClip"):
        ClippedSSTM([weight()], 1.0, 1.0, clipping_type="quadratic_rand_autoclip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"L": 0.0}, r"L must be in \(0, inf\), got 0.0"),  # B33
        ({"lr": -1.0}, "lr must be in"),
        ({"nu": 2.0}, "nu must be in"),
        ({"a_k_ratio_upper_bound": 0.0}, "a_k_ratio_upper_bound must be in"),
        ({"clipping_iter_start": -1}, "clipping_iter_start must be"),
        ({"clipping_iter_start": 2.5}, "clipping_iter_start must be a whole number from 0"),
        ({"lr": math.inf}, "lr must be in"),
        ({"offset": 3}, "offset must be 1 or 2"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SSTM([weight()], **settings)


def test_a_learning_rate_of_zero_moves_nothing():
    # B33: a scheduler may end there.
    param = weight()
    optimizer = ClippedSSTM([param], 0.0, 1.0, clipping_type="norm")
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert param.item() == 1.0
    optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert math.isfinite(param.item())
    assert param.item() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resume_is_bit_equal_and_state_lives_by_parameter(tmp_path, dtype):
    # B35: tensors are in `state`, so that loading moves them with their parameters.
    def grads(params, k):
        generator = torch.Generator().manual_seed(k)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)

    params = [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, 2, dtype=dtype))]
    optimizer = ClippedSSTM(params, 0.1, 1.0, clipping_type="linear_rand_norm", clipping_level=0.1)
    for k in range(5):
        grads(params, k)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    assert not any(
        isinstance(value, torch.Tensor)
        for group in optimizer.param_groups
        for key, value in group.items()
        if key != "params"
    )
    twins = copy.deepcopy(params)
    twin = ClippedSSTM(twins, 0.1, 1.0, clipping_type="linear_rand_norm", clipping_level=0.1)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for k in range(5, 12):
        for some, one in ((params, optimizer), (twins, twin)):
            grads(some, k)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_non_finite_gradients_advance_nothing():
    param = weight()
    optimizer = ClippedSSTM([param], 1.0, 1.0, clipping_type="norm")
    walk(optimizer, param, 2)
    before, group = param.item(), dict(optimizer.param_groups[0])
    param.grad = torch.full_like(param, math.nan)
    optimizer.step()
    assert param.item() == before
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in group.items() if k != "params"
    }
    assert optimizer.clipping.telemetry.skipped_steps == 1


def test_step_after_eval_says_what_to_do():
    param = weight()
    optimizer = SSTM([param], 1.0, 1.0)
    optimizer.eval()
    optimizer.eval()
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        optimizer.step()


def test_half_precision_parameters_keep_a_float32_buffer():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = ClippedSSTM([param], 1e-4, 1.0, clipping_type="norm")
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["z"].dtype is torch.float32
    assert (optimizer.state[param]["z"] < 1).all()
