"""SPAM's and StableSPAM's clipping against their formulas, and against published code that clips nothing."""

import io
import math
import re

import numpy as np
import pytest
import torch

from torch_clip import clip
from torch_clip.methods import AdaClip, AdaGN, SpamClip, StableSpamClip

SHAPES = ((7,), (4, 3), (2, 3, 5), ())


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def heavy_tailed_stream(steps, seed=0):
    """Student-t(2) elements of tensors of unlike sizes, in float64 NumPy."""
    rng = np.random.default_rng(seed)
    return [[rng.standard_t(2, shape) * 10.0**-i for i, shape in enumerate(SHAPES)] for _ in range(steps)]


def clipped_by(clipping, grads, dtype=torch.float64):
    """What the clipping makes of gradients, None for none, in float64 NumPy; and its telemetry."""
    params = []
    for shape, grad in zip(SHAPES, grads, strict=False):
        params.append(torch.nn.Parameter(torch.ones(shape, dtype=dtype)))
        if grad is not None:
            params[-1].grad = torch.tensor(grad, dtype=dtype)
    said = clipping.clip_(params)
    return [None if p.grad is None else p.grad.double().numpy() for p in params], said


def agree(got, wanted, rtol=1e-9):
    assert [g is None for g in got] == [w is None for w in wanted]
    for one, other in zip(got, wanted, strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-12)


def norm(grads):
    return math.sqrt(sum((g**2).sum() for g in grads if g is not None))


# SPAM.


class SpamReference:
    """C4, with the average corrected for its start at zero and each tensor's own count of gradients."""

    def __init__(self, theta=5000.0, decay=0.999, warmup=100):
        self.theta, self.decay, self.warmup = theta, decay, warmup
        self.v, self.t = {}, {}

    def step(self, grads):
        out, bounds = [], []
        for i, g in enumerate(grads):
            if g is None or not np.any(g):
                out.append(g)
                continue
            v, t = self.v.get(i, np.zeros_like(g)), self.t.get(i, 0)
            if t >= self.warmup:
                bound = np.where(v > 0, np.sqrt(self.theta * v / (1 - self.decay**t)), np.inf)
                bounds.append(bound)
                g = np.sign(g) * np.minimum(np.abs(g), bound)
            self.v[i], self.t[i] = self.decay * v + (1 - self.decay) * g**2, t + 1
            out.append(g)
        return out, bounds


def test_worked_value(path):
    # With decay 0 the average is the last step's square: v = 0.04, so that the bound is sqrt(100 * 0.04) = 2.
    clipping = SpamClip(theta=100, decay=0.0, warmup=1)
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([0.2, -0.2, 0.2])
    assert float(clipping.clip_([param]).clip_coef) == 1.0
    param.grad = torch.tensor([5.0, 1.9, -5.0])
    said = clipping.clip_([param])
    assert param.grad.tolist() == pytest.approx([2.0, 1.9, -2.0])
    assert param.grad[1].item() == torch.tensor(1.9).item()
    assert float(said.threshold) == pytest.approx(2.0)
    assert (float(said.clipped), clipping.unit) == (pytest.approx(2 / 3), "elements")
    assert float(said.grad_norm) == pytest.approx(math.sqrt(50 + 1.9**2))
    assert float(said.clip_coef) == pytest.approx(math.sqrt((8 + 1.9**2) / (50 + 1.9**2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [{"theta": 4.0, "decay": 0.9, "warmup": 5}, {"theta": 25.0, "warmup": 1}, {"theta": 1e-3, "warmup": 40}],
)
def test_spam_follows_its_formula(path, settings, dtype):
    clipping, wanted = SpamClip(**settings), SpamReference(**settings)
    steps_clipped = 0
    for grads in heavy_tailed_stream(60):
        got, said = clipped_by(clipping, grads, dtype)
        want, bounds = wanted.step(grads)
        agree(got, want, 1e-9 if dtype is torch.float64 else 5e-4)
        steps_clipped += float(said.clipped) > 0
        if dtype is torch.float64:
            changed = sum(np.count_nonzero(w != g) for w, g in zip(want, grads, strict=True))
            assert float(said.clipped) == pytest.approx(changed / sum(g.size for g in grads), abs=1e-6)
            assert float(said.clip_coef) == pytest.approx(norm(want) / norm(grads), rel=1e-6)
        if bounds:
            bounds = np.concatenate([bound.ravel() for bound in bounds])
            assert float(said.threshold) == pytest.approx(math.sqrt((bounds**2).mean()), rel=1e-3)
        else:
            assert float(said.threshold) == math.inf
    assert steps_clipped == int(said.clipped_steps) > 10


def test_gradients_that_come_and_go(path):
    settings = {"theta": 4.0, "decay": 0.9, "warmup": 5}
    clipping, wanted = SpamClip(**settings), SpamReference(**settings)
    rng = np.random.default_rng(2)
    for k, grads in enumerate(heavy_tailed_stream(80, seed=1)):
        grads = [g if i == 0 or rng.random() < 0.5 else (None, 0 * g)[k % 2] for i, g in enumerate(grads)]
        agree(clipped_by(clipping, grads)[0], wanted.step(grads)[0])


def test_it_is_off_until_its_average_is_warm(path):
    clipping = SpamClip(theta=4.0, warmup=10)
    for k in range(10):
        (grad,), said = clipped_by(clipping, [np.full(7, 1e4 if k == 9 else 1.0)])
        assert (grad == (1e4 if k == 9 else 1.0)).all()
        assert (float(said.clip_coef), float(said.threshold)) == (1.0, math.inf)
    clipping = SpamClip(theta=4.0, warmup=10)
    for _ in range(10):
        clipped_by(clipping, [np.ones(7)])
    (grad,), said = clipped_by(clipping, [np.full(7, -1e4)])
    assert grad == pytest.approx(np.full(7, -2.0), rel=1e-5)
    assert float(said.clipped) == 1.0


def test_an_element_without_history_is_not_frozen(path):
    # sqrt(theta * 0) is no bound: a row of an embedding that was not looked up, a relu that opens late.
    clipping = SpamClip(theta=4.0, decay=0.9, warmup=3)
    quiet = np.array([1.0, 0.0, 1.0, 0, 0, 0, 0])
    for _ in range(10):
        clipped_by(clipping, [quiet])
    (grad,), said = clipped_by(clipping, [np.array([1.0, 7.0, 1.0, -3.0, 0, 0, 0])])
    assert grad == pytest.approx(np.array([1.0, 7.0, 1.0, -3.0, 0, 0, 0]))
    assert float(said.clip_coef) == 1.0
    (grad,), _ = clipped_by(clipping, [np.array([1.0, 700.0, 1.0, -3.0, 0, 0, 0])])
    bound = math.sqrt(4 * 0.1 / (1 - 0.9**11))  # times what it was the step before
    assert grad == pytest.approx(np.array([1.0, 7 * bound, 1.0, -3 * bound, 0, 0, 0]), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_spike_reaches_no_second_moment(path, fused):
    """In the published code a mask is written to a copy: a spike of 1e4 takes v from 0.005 to 1e5."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = clip(torch.optim.AdamW([param], lr=0.0, fused=fused), SpamClip(theta=5000, warmup=20))
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        param.grad = torch.randn(4, generator=rng) * 0.3
        optimizer.step()
    before = optimizer.state[param]["exp_avg_sq"].clone()
    param.grad = torch.tensor([0.1, 1e4, 0.1, -1e4])
    optimizer.step()
    after = optimizer.state[param]["exp_avg_sq"]
    assert after.max().item() < 1.0  # 5000 / 1000 of a variance of 0.1
    assert after.max().item() > before.max().item()
    kept = optimizer.clipping.state_dict()["squares"][0]
    assert kept.max().item() < 1.0
    assert param.grad.abs().max().item() < 50
    assert float(optimizer.clipping.telemetry.clipped) == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages_are_float32(path, dtype):
    clipping, twin = (SpamClip(theta=4.0, decay=0.99, warmup=5) for _ in range(2))
    for grads in heavy_tailed_stream(40, seed=3):
        rounded = [torch.tensor(g, dtype=dtype).double().numpy() for g in grads]
        got, _ = clipped_by(clipping, rounded, dtype)
        agree(got, clipped_by(twin, rounded, torch.float32)[0], 1e-2)
    for i, buffer in clipping.state_dict()["squares"].items():
        assert (buffer.dtype, buffer.shape) == (torch.float32, SHAPES[i])


# StableSPAM.


class AdaClipReference:
    def __init__(self, theta=0.999):
        self.theta, self.m, self.t = theta, {}, {}

    def step(self, grads):
        out = []
        for i, g in enumerate(grads):
            if g is None or not np.any(g):
                out.append(g)
                continue
            largest = np.abs(g).max()
            self.m[i] = self.theta * self.m.get(i, 0.0) + (1 - self.theta) * largest
            self.t[i] = self.t.get(i, 0) + 1
            bound = self.m[i] / (1 - self.theta ** self.t[i])
            # A tensor whose largest is the average itself is not clipped by a rounding error.
            out.append(np.where(np.abs(g) > bound * (1 + 1e-12), g * bound / largest, g))
        return out


class AdaGNReference:
    def __init__(self, mean_decay=0.7, square_decay=0.9):
        self.decays, self.m, self.v, self.t = (mean_decay, square_decay), {}, {}, {}

    def step(self, grads):
        (a, b), out = self.decays, []
        for i, g in enumerate(grads):
            if g is None or not np.any(g):
                out.append(g)
                continue
            n = norm([g])
            self.m[i] = a * self.m.get(i, 0.0) + (1 - a) * n
            self.v[i] = b * self.v.get(i, 0.0) + (1 - b) * n**2
            self.t[i] = self.t.get(i, 0) + 1
            m, v = self.m[i] / (1 - a ** self.t[i]), self.v[i] / (1 - b ** self.t[i])
            out.append(g * m / math.sqrt(v) / n)
        return out


class StableSpamReference:
    def __init__(self, theta=0.999, mean_decay=0.7, square_decay=0.9):
        self.parts = AdaClipReference(theta), AdaGNReference(mean_decay, square_decay)

    def step(self, grads):
        first, second = self.parts
        return second.step(first.step(grads))


STABLE = [
    (AdaClip, AdaClipReference, {}),
    (AdaClip, AdaClipReference, {"theta": 0.5}),
    (AdaClip, AdaClipReference, {"theta": 0.0}),
    (AdaGN, AdaGNReference, {}),
    (AdaGN, AdaGNReference, {"mean_decay": 0.99, "square_decay": 0.0}),
    (StableSpamClip, StableSpamReference, {}),
    (StableSpamClip, StableSpamReference, {"theta": 0.9, "mean_decay": 0.5, "square_decay": 0.99}),
]


@pytest.mark.parametrize(("method", "reference", "settings"), STABLE)
def test_stable_spam_follows_its_formulas(path, method, reference, settings):
    clipping, wanted = method(**settings), reference(**settings)
    for grads in heavy_tailed_stream(60, seed=4):
        got, said = clipped_by(clipping, grads)
        want = wanted.step(grads)
        agree(got, want)
        assert float(said.grad_norm) == pytest.approx(norm(grads), rel=1e-6)
        assert float(said.clip_coef) == pytest.approx(norm(want) / norm(grads), rel=1e-6)


@pytest.mark.parametrize(("method", "reference", "settings"), STABLE)
def test_stable_spam_in_float32_with_gradients_missing(path, method, reference, settings):
    clipping, wanted = method(**settings), reference(**settings)
    rng = np.random.default_rng(5)
    for k, grads in enumerate(heavy_tailed_stream(60, seed=6)):
        grads = [g if i == 0 or rng.random() < 0.6 else (None, 0 * g)[k % 2] for i, g in enumerate(grads)]
        agree(clipped_by(clipping, grads, torch.float32)[0], wanted.step(grads), 1e-4)


@pytest.mark.parametrize("theta", [0.9, 0.99, 0.999, 0.9999])
def test_a_steady_gradient_is_not_clipped(path, theta):
    """The average of equal values is that value, however it is corrected for its start."""
    clipping = AdaClip(theta)
    for _ in range(120):
        (grad,), said = clipped_by(clipping, [np.array([0.3, -0.7, 0.1, 0, 0, 0, 0])], torch.float32)
        assert float(said.threshold) == pytest.approx(0.7, rel=1e-4)
        assert grad[1] == pytest.approx(-0.7, rel=1e-5)
        assert float(said.clip_coef) == pytest.approx(1.0, rel=1e-5)


def test_only_what_towers_over_the_average_is_scaled(path):
    clipping = AdaClip(theta=0.9)
    for _ in range(200):
        clipped_by(clipping, [np.ones(7)])
    spike = np.array([100.0, 50.0, 0.5, -80.0, 1.0, 0.0, -0.5])
    (grad,), said = clipped_by(clipping, [spike])
    bound = 0.9 * 1 + 0.1 * 100
    wanted = [bound, 50 * bound / 100, 0.5, -80 * bound / 100, 1.0, 0.0, -0.5]
    assert grad == pytest.approx(np.array(wanted), rel=1e-6)
    assert float(said.clipped) == pytest.approx(3 / 7)
    assert float(said.threshold) == pytest.approx(bound, rel=1e-6)


def test_the_norms_of_adagn(path):
    # The first gradient comes out as 1, since then the mean is the root of the mean square.
    clipping = AdaGN()
    for scale in (1e-6, 1e-6, 1e-6):
        (grad,), said = clipped_by(clipping, [np.full(7, scale)])
        assert norm([grad]) == pytest.approx(1.0, rel=1e-4)
        assert float(said.clip_coef) == pytest.approx(1 / (scale * math.sqrt(7)), rel=1e-4)
    (grad,), said = clipped_by(clipping, [np.full(7, 1.0)])
    assert norm([grad]) < 1.0  # smaller after a spike
    assert not AdaGN().bounded
    assert not StableSpamClip().bounded
    (zero,), said = clipped_by(clipping, [np.zeros(7)])
    assert not zero.any()
    assert float(said.clip_coef) == 1.0


# All of them.

ALL = [
    lambda **k: SpamClip(theta=4.0, decay=0.9, warmup=5, **k),
    lambda **k: AdaClip(theta=0.9, **k),
    AdaGN,
    StableSpamClip,
]
IDS = ["spam", "adaclip", "adagn", "stable_spam"]


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_what_is_not_finite_is_never_remembered(path, make, nonfinite, same):
    clean, spoilt = make(nonfinite=nonfinite), make(nonfinite=nonfinite)
    for k, grads in enumerate(heavy_tailed_stream(40, seed=7)):
        if k in (0, 4, 5, 20):
            bad = [g.copy() for g in grads]
            bad[1][0, 0] = (math.nan, math.inf)[k % 2]
            clipped_by(spoilt, bad)
        wanted, got = clipped_by(clean, grads), clipped_by(spoilt, grads)
        assert all(map(np.array_equal, got[0], wanted[0]))
        assert float(got[1].threshold) == float(wanted[1].threshold)


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_under_propagate_a_nan_is_never_counted_as_clipped(path, make):
    # And it is one tensor's matter: the others are clipped as ever.
    clipping, twin = make(nonfinite="propagate"), make(nonfinite="propagate")
    for grads in heavy_tailed_stream(30, seed=8):
        clipped_by(clipping, grads)
        clipped_by(twin, grads)
    calm = [1e-3 * g for g in heavy_tailed_stream(1, seed=9)[0]]
    bad = [g.copy() for g in calm]
    bad[1][0, 0] = math.nan
    got, said = clipped_by(clipping, bad)
    want, _ = clipped_by(twin, [calm[0], None, *calm[2:]])
    for i in (0, 2, 3):
        if clipping.bounded:  # AdaGN's averages take the step in, or not, before they decide
            np.testing.assert_allclose(got[i], want[i], rtol=1e-6)
        assert np.isfinite(got[i]).all()
    assert np.isnan(got[1][0, 0])
    if clipping.bounded:
        assert float(said.clipped) == 0.0


@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_both_paths_propagate_alike(make, device_path):
    outcomes = []
    for on_device in (False, True):
        if on_device:
            device_path()
        clipping = make(nonfinite="propagate")
        for grads in heavy_tailed_stream(30, seed=8):
            clipped_by(clipping, grads)
        for bad in (math.nan, math.inf):
            grads = [1e4 * g for g in heavy_tailed_stream(1, seed=9)[0]]
            grads[1][0, 0] = bad
            outcomes.append(clipped_by(clipping, grads)[0])
    for host, device in zip(outcomes[:2], outcomes[2:], strict=True):
        agree(device, host, 1e-6)


@pytest.mark.parametrize("after", [0, 3, 5, 17])
@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_resuming_through_a_file(path, make, same, after):
    one, other = make(), make()
    stream = heavy_tailed_stream(35, seed=10)
    for grads in stream[:after]:
        clipped_by(one, grads, torch.float32)
    other.load_state_dict(through_file(one.state_dict()))
    saved = one.state_dict()
    kept = through_file(saved)
    for grads in stream[after:]:
        wanted, got = clipped_by(one, grads, torch.float32), clipped_by(other, grads, torch.float32)
        assert all(map(np.array_equal, got[0], wanted[0]))
        assert same(tuple(got[1]), tuple(wanted[1]))
    assert same(other.state_dict(), one.state_dict())
    assert same(saved, kept)  # a copy, which does not move with the run


def test_sparse_gradients_and_other_shapes_are_refused(path):
    module = torch.nn.Embedding(4, 2, sparse=True)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="parameter 0 has a sparse gradient; a memory of each element needs"):
        SpamClip().clip_(module.parameters())
    clipping = SpamClip()
    clipped_by(clipping, [np.ones(7), np.ones((4, 3))])
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((7,), (3, 4))]
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=re.escape("parameter 1 had a gradient of shape (4, 3), now one of")):
        clipping.clip_(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpamClip(theta=0), "theta must be in (0, inf], got 0"),
        (lambda: SpamClip(decay=1), "decay must be in [0, 1), got 1"),
        (lambda: SpamClip(warmup=0), "warmup must be a whole number from 1, got 0"),
        (lambda: AdaClip(theta=1), "theta must be in [0, 1), got 1"),
        (lambda: AdaGN(mean_decay=1), "mean_decay must be in [0, 1), got 1"),
        (lambda: StableSpamClip(square_decay=-1), "square_decay must be in [0, 1), got -1"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
