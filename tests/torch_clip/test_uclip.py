"""U-Clip: what is cut off comes back. Worked values, its accounts, and what it is for: no bias on average."""

import io
import math
import re

import numpy as np
import pytest
import torch

from torch_clip import clip
from torch_clip.methods import CoordWiseClip, UClip
from torch_clip.schedules import Linear
from torch_clip.scopes import Element, Global, PerGroup, PerModule, PerTensor, PerUnit


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def clipped_by(clipping, grads, dtype=torch.float64):
    """What the clipping makes of gradients, None for none, in float64 NumPy; and its telemetry."""
    params = []
    for grad in grads:
        shape = (1,) if grad is None else np.shape(grad)
        params.append(torch.nn.Parameter(torch.ones(shape, dtype=dtype)))
        if grad is not None:
            params[-1].grad = torch.tensor(grad, dtype=dtype)
    said = clipping.clip_(params)
    return [None if p.grad is None else p.grad.double().numpy() for p in params], said


def carry(clipping):
    return [tensor.double().numpy() for tensor in clipping.state_dict()["carry"].values()]


def norm(arrays):
    return math.sqrt(sum((array**2).sum() for array in arrays))


def cut(arrays, threshold, scope):
    """Arrays clipped at a threshold, as one, each, by rows or by elements."""
    if scope is Element:
        return [np.clip(a, -threshold, threshold) for a in arrays]
    if scope is Global:
        return [a * min(1.0, threshold / max(norm(arrays), 1e-30)) for a in arrays]
    if scope is PerTensor:
        return [a * min(1.0, threshold / max(norm([a]), 1e-30)) for a in arrays]
    return [np.stack([r * min(1.0, threshold / max(norm([r]), 1e-30)) for r in a]) for a in arrays]


def heavy_tailed_stream(steps, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.standard_t(2, shape) * 0.5 for shape in ((3, 2), (2, 4))] for _ in range(steps)]


def test_worked_values(path):
    clipping = UClip(1.0)
    given, got, left = (3.0, 0.2, 0.2, -0.5), [], []
    for value in given:
        ((u,),), said = clipped_by(clipping, [[value]])
        got.append(u)
        left.append(carry(clipping)[0].item())
        assert float(said.grad_norm) == pytest.approx(abs(value))
        assert float(said.clip_coef) == pytest.approx(abs(u / value))
        assert float(said.threshold) == 1.0
    assert got == pytest.approx([1.0, 1.0, 1.0, -0.1])
    assert left == pytest.approx([2.0, 1.2, 0.4, 0.0], abs=1e-12)
    assert (int(said.steps), int(said.clipped_steps), clipping.unit) == (4, 3, "elements")


def test_worked_values_of_a_norm(path):
    clipping = UClip(1.0, scope=Global())
    (u, v), _ = clipped_by(clipping, [[3.0], [4.0]])
    assert [u, v] == pytest.approx([0.6, 0.8])
    assert carry(clipping) == pytest.approx([2.4, 3.2])
    (u, v), _ = clipped_by(clipping, [[0.0], [0.0]])
    assert [u, v] == pytest.approx([0.6, 0.8])
    assert carry(clipping) == pytest.approx([1.8, 2.4])
    (u, v), _ = clipped_by(clipping, [[-1.8], [-1.6]])
    assert [u, v] == pytest.approx([0.0, 0.8])
    assert carry(clipping) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert clipping.unit == "steps"


@pytest.mark.parametrize(
    ("settings", "left", "out"),
    [
        ({"decay": 0.5}, [1.0, 0.1, 0.0], [1.0, 1.0, 0.3]),
        ({"decay": 0.0}, [0.0, 0.0, 0.0], [1.0, 0.2, 0.2]),
        ({"cap": 0.5}, [0.5, 0.0, 0.0], [1.0, 0.7, 0.2]),
        ({"decay": 0.5, "cap": 0.9}, [0.9, 0.05, 0.0], [1.0, 1.0, 0.25]),
    ],
)
@pytest.mark.parametrize("scope", [Element, Global, PerTensor])
def test_decay_and_cap(path, settings, left, out, scope):
    clipping = UClip(1.0, scope(), **settings)
    for value, u, rest in zip((3.0, 0.2, 0.2), out, left, strict=True):
        ((got,),), _ = clipped_by(clipping, [[value]])
        assert got == pytest.approx(u)
        assert carry(clipping)[0].item() == pytest.approx(rest, abs=1e-12)


@pytest.mark.parametrize("scope", [Element, Global, PerTensor, PerUnit])
@pytest.mark.parametrize("settings", [{}, {"decay": 0.9}, {"decay": 0.99, "cap": 3.0}], ids=str)
def test_it_follows_its_formula(path, scope, settings):
    clipping = UClip(0.5, scope(), **settings)
    left = [np.zeros((3, 2)), np.zeros((2, 4))]
    for grads in heavy_tailed_stream(60):
        got, said = clipped_by(clipping, grads)
        whole = [g + c for g, c in zip(grads, left, strict=True)]
        u = cut(whole, 0.5, scope)
        left = [settings.get("decay", 1.0) * (w - x) for w, x in zip(whole, u, strict=True)]
        left = cut(left, settings.get("cap", math.inf), scope)
        for one, other in zip([*got, *carry(clipping)], [*u, *left], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
        assert float(said.grad_norm) == pytest.approx(norm(grads))
        assert float(said.clip_coef) == pytest.approx(norm(u) / norm(grads), rel=1e-6)
    assert 0 < int(said.clipped_steps) <= 60


def test_what_comes_out_is_what_came_in(path):
    """Sum of u = sum of g - carry, at every step and exactly, whatever came."""
    clipping, came, went = UClip(0.3), [0.0, 0.0], [0.0, 0.0]
    for k, grads in enumerate(heavy_tailed_stream(150, seed=1)):
        grads = [None if k % 3 == i else g for i, g in enumerate(grads)]
        for i, (g, u) in enumerate(zip(grads, clipped_by(clipping, grads)[0], strict=True)):
            came[i] = came[i] + (0.0 if g is None else g)
            went[i] = went[i] + (0.0 if u is None else u)
            assert g is None or np.abs(u).max() <= 0.3
    for a, b, c in zip(came, went, carry(clipping)[::-1], strict=True):
        # The second parameter had the first gradient: states are by place, in the order of first use.
        np.testing.assert_allclose(a - b, c if c.shape == a.shape else carry(clipping)[0], atol=1e-9)


def test_it_is_unbiased_where_plain_clipping_is_not(path):
    """Skewed noise with infinite variance around a mean of 0.2: half of that mean lies in the tail."""
    steps, mean = 600, 0.2
    rng = np.random.default_rng(0)
    noise = rng.pareto(1.8, (steps, 60))
    grads = mean + 0.5 * (noise - 1 / 0.8)
    biased, unbiased = CoordWiseClip(1.0), UClip(1.0)
    sums, least = np.zeros((2, 60)), np.full(60, np.inf)
    for k, grad in enumerate(grads):
        for i, clipping in enumerate((biased, unbiased)):
            (u,), _ = clipped_by(clipping, [grad])
            assert np.abs(u).max() <= 1.0
            sums[i] += u
        if k >= steps // 2:
            least = np.minimum(least, np.abs(carry(unbiased)[0]))
    off = np.abs(sums - grads.sum(0)).mean(1) / steps
    np.testing.assert_allclose(grads.sum(0) - sums[1], carry(unbiased)[0], atol=1e-8)
    assert off[0] > 0.15  # most of the mean is lost
    assert off[1] < 0.05
    # Bounded: with the drift inside the threshold the carry is worked off, over and over.
    assert (least < 0.1).mean() > 0.8


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("scope", [Element, Global, PerUnit])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_leaves_the_carry(path, nonfinite, scope, bad):
    clean, spoilt = (UClip(0.5, scope(), 0.9, cap=2.0, nonfinite=nonfinite) for _ in range(2))
    for k, grads in enumerate(heavy_tailed_stream(20, seed=2)):
        if k in (0, 1, 7, 15):
            wrong = [grads[0].copy(), grads[1]]
            wrong[0][1, 0] = bad
            before = carry(spoilt)
            _, said = clipped_by(spoilt, wrong)
            assert not math.isfinite(float(said.grad_norm))
            for one, other in zip(carry(spoilt), before, strict=False):
                np.testing.assert_allclose(one, other, rtol=1e-12)
        for one, other in zip(clipped_by(spoilt, grads)[0], clipped_by(clean, grads)[0], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def test_under_propagate_an_infinite_element_is_clamped_and_the_rest_clipped(path):
    clipping = UClip(1.0, nonfinite="propagate")
    clipped_by(clipping, [[3.0, 0.5, 0.0]])
    (u,), _ = clipped_by(clipping, [[0.1, math.inf, math.nan]])
    assert u[:2].tolist() == [1.0, 1.0]
    assert math.isnan(u[2])
    assert carry(clipping)[0].tolist() == pytest.approx([2.0, 0.0, 0.0])


@pytest.mark.parametrize("after", [0, 1, 17])
@pytest.mark.parametrize("scope", [Element, PerTensor])
def test_resuming_through_a_file(path, same, after, scope):
    one, other = UClip(0.5, scope(), decay=0.9, cap=4.0), UClip(0.5, scope(), decay=0.9, cap=4.0)
    stream = heavy_tailed_stream(40, seed=3)
    for grads in stream[:after]:
        clipped_by(one, grads, torch.float32)
    saved = one.state_dict()
    kept = through_file(saved)
    assert set(saved["carry"]) == (set() if after == 0 else {0, 1})
    other.load_state_dict(kept)
    for grads in stream[after:]:
        wanted, got = clipped_by(one, grads, torch.float32), clipped_by(other, grads, torch.float32)
        assert all(map(np.array_equal, got[0], wanted[0]))
        assert same(tuple(got[1]), tuple(wanted[1]))
    assert same(other.state_dict(), one.state_dict())
    assert same(saved, kept)  # a copy, which does not move with the run
    other.reset()
    assert other.state_dict()["carry"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_carry_is_float32(path, dtype):
    """Rounding is carried too: a sum in bfloat16 would stop growing at 256 times what is added."""
    clipping = UClip(1.0)
    total = 0.0
    clipped_by(clipping, [[300.0]], dtype)
    for _ in range(300):
        (u,), _ = clipped_by(clipping, [[0.5]], dtype)
        total += u.item()
    (buffer,) = clipping.state_dict()["carry"].values()
    assert buffer.dtype is torch.float32
    assert total + 1.0 + buffer.item() == pytest.approx(450.0, rel=1e-5)


@pytest.mark.parametrize(("cls", "settings"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize("fused", [False, True])
def test_attached_it_is_clipping_by_hand(path, cls, settings, fused):
    params = [[torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2, 4))] for _ in range(2)]
    plain, clipped = (cls(ps, lr=0.1, fused=fused, **settings) for ps in params)
    clip(clipped, UClip(0.3))
    by_hand = UClip(0.3)
    stream = heavy_tailed_stream(15, seed=4)
    stream[6][0][0, 0] = math.inf
    for grads in stream:
        for ps in params:
            for param, grad in zip(ps, grads, strict=True):
                param.grad = torch.tensor(grad, dtype=torch.float32)
        if all(np.isfinite(g).all() for g in grads):
            by_hand.clip_(params[0])
            plain.step()
        clipped.step()
    torch.testing.assert_close(params[1], params[0], rtol=1e-6, atol=0)
    assert int(clipped.clipping.telemetry.skipped_steps) == 1
    state = clipped.state_dict()["clipping"]["carry"]
    torch.testing.assert_close(state, by_hand.state_dict()["carry"], rtol=1e-6, atol=1e-9)


def test_groups_modules_and_schedules(path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).double()
    named = list(net.named_parameters())
    for scope in (PerGroup(), PerModule()):
        optimizer = torch.optim.SGD([{"params": named[:2]}, {"params": named[2:]}], lr=0.0)
        clip(optimizer, UClip(1.0, scope))
        for param in net.parameters():
            param.grad = torch.full_like(param, 10.0)
        optimizer.step()
        for part in net:  # each group is a module here
            lengths = [param.grad.norm() for param in part.parameters()]
            assert math.hypot(*lengths) == pytest.approx(1.0)
        assert optimizer.clipping.unit == ("groups" if isinstance(scope, PerGroup) else "modules")
    clipping = UClip(Linear(1.0, 3.0, steps=2))
    assert [clipped_by(clipping, [[10.0]])[0][0].item() for _ in range(4)] == pytest.approx([1, 2, 3, 3])


def test_an_infinite_threshold_changes_nothing(path):
    for scope in (Element, Global, PerTensor, PerUnit):
        clipping = UClip(math.inf, scope())
        for grads in heavy_tailed_stream(5):
            got, said = clipped_by(clipping, grads, torch.float32)
            for one, other in zip(got, grads, strict=True):
                assert np.array_equal(one.astype(np.float32), other.astype(np.float32))
            assert float(said.clip_coef) == pytest.approx(1.0)
            assert (float(said.clipped), int(said.clipped_steps)) == (0.0, 0)
        assert not any(left.any() for left in carry(clipping))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1}, "threshold must be in [0, inf], got -1"),
        ({"decay": 1.1}, "decay must be in [0, 1], got 1.1"),
        ({"decay": -0.1}, "decay must be in [0, 1], got -0.1"),
        ({"cap": 0}, "cap must be in (0, inf], got 0"),
        ({"scope": Element(measure=False)}, "without measuring"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        UClip(**settings)


def test_sparse_gradients_are_refused(path):
    module = torch.nn.Embedding(4, 2, sparse=True)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="parameter 0 has a sparse gradient"):
        UClip().clip_(module.parameters())
