"""AdaGC against its paper: worked value, a float64 reference, and no tensor that freezes or is let off."""

import io
import math
import re

import numpy as np
import pytest
import torch

from torch_clip import clip
from torch_clip.methods import AdaGC

SHAPES = ((7,), (4, 3), (2, 3, 5), ())


@pytest.fixture
def step(parameters):
    """A step of tensors of given norms, None for none: (clipping, norms) -> (norms after, telemetry)."""

    def run(clipping, norms, dtype=torch.float64):
        params = parameters(*[[0.6 * (n or 0.0), 0.8 * (n or 0.0)] for n in norms], dtype=dtype)
        for param, norm in zip(params, norms, strict=True):
            if norm is None:
                param.grad = None
        said = clipping.clip_(params)
        return [None if p.grad is None else p.grad.double().norm().item() for p in params], said

    return run


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def heavy_tailed_norms(count, tensors, seed=0):
    """Tensors of unlike sizes, with a Student-t(2) tail each."""
    rng = np.random.default_rng(seed)
    return np.abs(rng.standard_t(2, (count, tensors))) * 10.0 ** np.arange(-2, tensors - 2) + 1e-3


class Reference:
    """C3 in float64, of one list of norms a step."""

    def __init__(self, relative=1.05, absolute=1.0, decay=0.98, warmup=100):
        self.settings, self.t, self.gamma = (relative, absolute, decay, warmup), 0, {}

    def step(self, norms):
        relative, absolute, decay, warmup = self.settings
        total = math.sqrt(sum((n or 0.0) ** 2 for n in norms))
        h = min(1.0, absolute / total) if total else 1.0
        out = []
        for i, n in enumerate(norms):
            if not n:  # no gradient, or zero: nothing is known of it
                out.append(n)
            elif self.t < warmup or i not in self.gamma:
                out.append(h * n)
                self.gamma[i] = max(min(self.gamma.get(i, math.inf), h * n), 1e-8)
            else:
                out.append(min(n, relative * self.gamma[i]))
                self.gamma[i] = max(decay * self.gamma[i] + (1 - decay) * out[-1], 1e-8)
        self.t += 1
        return out


def averages(clipping):
    (vector,) = [v for v in clipping.state_dict().values() if isinstance(v, torch.Tensor) and v.ndim]
    return vector


def test_worked_value(path, step):
    clipping = AdaGC(warmup=1)
    after, _ = step(clipping, [1.0])
    assert after == [1.0]
    assert averages(clipping).tolist() == [1.0]
    after, said = step(clipping, [10.0])
    assert after == pytest.approx([1.05], rel=1e-6)
    assert averages(clipping).tolist() == pytest.approx([1.001], rel=1e-6)
    assert float(said.threshold) == pytest.approx(1.05)
    assert (float(said.clipped), clipping.unit) == (1.0, "tensors")


@pytest.mark.parametrize(
    "settings",
    [{}, {"warmup": 1}, {"relative": 1.5, "absolute": 10.0, "decay": 0.9, "warmup": 20}],
    ids=["defaults", "short", "others"],
)
def test_it_follows_its_formula(path, step, settings):
    clipping, wanted = AdaGC(**settings), Reference(**settings)
    clipped = 0
    for norms in heavy_tailed_norms(300, 4):
        after, said = step(clipping, norms.tolist())
        assert after == pytest.approx(wanted.step(norms.tolist()), rel=1e-9)
        clipped += float(said.clipped)
        total = math.sqrt(sum(norms**2))
        assert float(said.grad_norm) == pytest.approx(total)
        assert float(said.clip_coef) == pytest.approx(math.sqrt(sum(np.square(after))) / total)
    assert 20 < clipped < 300
    assert averages(clipping).tolist() == pytest.approx([wanted.gamma[i] for i in range(4)], rel=1e-9)


def test_it_follows_its_formula_in_float32_with_gradients_missing(path, step):
    clipping, wanted = AdaGC(warmup=30), Reference(warmup=30)
    rng = np.random.default_rng(3)
    for k, norms in enumerate(heavy_tailed_norms(200, 5, seed=1).tolist()):
        norms = [(None, 0.0)[k % 2] if rng.random() < 0.3 else norm for norm in norms]
        norms[4] = norms[4] if k >= 50 else None  # begins after the warm-up
        norms[0] = norms[0] or 1.0
        after, _ = step(clipping, norms, torch.float32)
        want = wanted.step(norms)
        assert [a is None for a in after] == [w is None for w in want]
        assert [a or 0.0 for a in after] == pytest.approx([w or 0.0 for w in want], rel=1e-4)


def test_the_threshold_doubles_in_693_steps(path, step):
    # beta + (1 - beta) * lambda_rel = 1.001 a step, as fast as it can: ln 2 / ln 1.001 = 693.5.
    clipping = AdaGC(warmup=1)
    step(clipping, [1.0])
    steps = 0
    while averages(clipping).item() < 2.0:
        step(clipping, [1e6])
        steps += 1
        assert steps < 800
    assert 690 <= steps <= 696


@pytest.mark.parametrize("absent", [None, 0.0])
def test_a_tensor_without_gradient_in_the_warmup_is_neither_frozen_nor_let_off(path, step, absent):
    clipping = AdaGC(warmup=5)
    for _ in range(8):
        after, said = step(clipping, [0.5, absent])
        assert after[0] == pytest.approx(0.5)
        assert float(said.clip_coef) == 1.0
    # Its first gradient begins as all do in the warm-up: the whole clipped at lambda_abs = 1.
    after, _ = step(clipping, [0.5, 1e3])
    assert after[0] == pytest.approx(0.5)
    assert after[1] == pytest.approx(1.0, rel=1e-5)
    assert averages(clipping).tolist() == pytest.approx([0.5, 1.0], rel=1e-5)
    after, _ = step(clipping, [0.5, 1e3])
    assert after[1] == pytest.approx(1.05, rel=1e-5)
    # A pause later on changes nothing.
    for _ in range(5):
        step(clipping, [0.5, absent])
    assert averages(clipping)[1].item() == pytest.approx(1.001, rel=1e-5)


def test_the_average_stays_above_zero(path, step):
    clipping = AdaGC(warmup=2)
    for norm in (1e-12, 1e-12, 1e-12):
        step(clipping, [norm, 1.0])
    assert averages(clipping)[0].item() == pytest.approx(1e-8)
    first = [step(clipping, [1.0, 1.0])[0][0] for _ in range(700)]
    assert first[0] == pytest.approx(1.05e-8)
    assert first[-1] > 1.9 * first[0]  # 1.001 ** 700 = 2.01


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_remembered(path, step, nonfinite, bad):
    clean = AdaGC(warmup=10, nonfinite=nonfinite)
    spoilt = AdaGC(warmup=10, nonfinite=nonfinite)
    for k, norms in enumerate(heavy_tailed_norms(40, 3).tolist()):
        if k in (0, 5, 10, 11, 30):
            after, said = step(spoilt, [norms[0], bad, norms[2]])
            assert not math.isfinite(float(said.grad_norm))
            if nonfinite == "propagate" and k > 10:  # each tensor by itself
                own = step(clean, [norms[0], 0.0, norms[2]])[0]
                step(spoilt, [norms[0], 0.0, norms[2]])
                assert [after[0], after[2]] == pytest.approx([own[0], own[2]])
                assert not math.isfinite(after[1])
        wanted, got = step(clean, norms), step(spoilt, norms)
        assert got[0] == wanted[0]
        assert float(got[1].threshold) == float(wanted[1].threshold)
    assert averages(spoilt).tolist() == averages(clean).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_state_is_one_float32_vector(path, dtype):
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    clipping, rng = AdaGC(warmup=2), torch.Generator().manual_seed(0)
    for _ in range(6):
        for param in params:
            param.grad = torch.randn(param.shape, generator=rng).to(dtype)
        clipping.clip_(params)
        assert all(param.grad.dtype is dtype for param in params)
    vector = averages(clipping)
    assert (vector.dtype, vector.shape) == (torch.float32, (len(SHAPES),))
    # In bfloat16 a growth of 0.1 % a step would be rounded away.
    before = vector.clone()
    for param in params:
        param.grad = torch.full_like(param, 100.0)
    clipping.clip_(params)
    torch.testing.assert_close(averages(clipping), 1.001 * before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("after", [0, 3, 10, 50])
def test_resuming_through_a_file(path, step, same, after):
    one, other = AdaGC(warmup=10), AdaGC(warmup=10)
    stream = heavy_tailed_norms(90, 3).tolist()
    for norms in stream[:after]:
        step(one, norms)
    other.load_state_dict(through_file(one.state_dict()))
    for norms in stream[after:]:
        wanted, got = step(one, norms), step(other, norms)
        assert got[0] == wanted[0]
        assert same(tuple(got[1]), tuple(wanted[1]))
    assert same(other.state_dict(), one.state_dict())
    other.reset()
    fresh = AdaGC(warmup=10)
    assert step(other, [3.0, 4.0])[0] == step(fresh, [3.0, 4.0])[0]  # of another number of tensors


def test_a_state_of_one_path_goes_on_on_the_other(step, device_path):
    one, stream = AdaGC(warmup=10), heavy_tailed_norms(60, 3).tolist()
    for norms in stream[:30]:
        step(one, norms)
    state = through_file(one.state_dict())
    wanted = [step(one, norms)[0] for norms in stream[30:]]
    device_path()
    other = AdaGC(warmup=10)
    other.load_state_dict(state)
    assert [step(other, norms)[0] for norms in stream[30:]] == [pytest.approx(w, rel=1e-9) for w in wanted]


def test_tensors_added_later_begin_then(path, parameters):
    first, second = parameters([1.0], [1.0])
    optimizer = clip(torch.optim.SGD([first], lr=0.0), AdaGC(warmup=3))
    wanted = Reference(warmup=3)
    for k in range(20):
        if k == 10:
            optimizer.add_param_group({"params": [second]})
        first.grad = torch.tensor([1.0 + 9.0 * (k % 4 == 3)])
        second.grad = torch.tensor([20.0 + k])
        norms = [p.grad.item() for p in (first, second)][: 1 + (k >= 10)]
        optimizer.step()
        got = [p.grad.item() for p in (first, second)][: len(norms)]
        assert got == pytest.approx(wanted.step(norms), rel=1e-5)
    assert len(averages(optimizer.clipping)) == 2


def test_fewer_tensors_are_refused(path, step):
    clipping = AdaGC()
    step(clipping, [1.0, 2.0, 3.0])
    before = averages(clipping)
    with pytest.raises(ValueError, match=r"3 units are remembered, and 2 came: give the same parameters"):
        step(clipping, [1.0, 2.0])
    assert averages(clipping).tolist() == before.tolist()
    step(clipping, [1.0, 2.0, None])  # without gradient they are there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relative": 1.0}, "relative must be in (1, inf], got 1"),
        ({"absolute": 0}, "absolute must be in (0, inf], got 0"),
        ({"decay": 1.0}, "decay must be in [0, 1), got 1"),
        ({"warmup": 0}, "warmup must be a whole number from 1, got 0"),
        ({"warmup": math.inf}, "warmup must be a whole number from 1, got inf"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AdaGC(**settings)
