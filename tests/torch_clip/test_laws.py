"""Laws that hold for every method; a new entry in CLIPPINGS is tested without a new line here."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch

from torch_clip import CLIPPINGS, Clipping, NonFiniteGradientError, clip
from torch_clip.norms import Global
from torch_clip.thresholds import Constant

pytestmark = pytest.mark.parametrize("name", CLIPPINGS)


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def never_clipping(name):
    """The method with the setting at which it clips nothing."""
    settings = {"threshold": math.inf, "percentile": 1.0}
    known = inspect.signature(CLIPPINGS[name]).parameters
    return CLIPPINGS[name](**{key: value for key, value in settings.items() if key in known})


def norm_of(grads):
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))


@pytest.mark.parametrize("path", ["host", "device"])
def test_zero_gradients(name, path, parameters, device_path):
    if path == "device":
        device_path()
    clipping = CLIPPINGS[name]()
    for _ in range(3):
        params = parameters([0.0, 0.0], [0.0])
        telemetry = clipping.clip_(params)
        assert all((p.grad == 0).all() for p in params)
        assert (float(telemetry.grad_norm), float(telemetry.clip_coef)) == (0.0, 1.0)
        assert (float(telemetry.clipped), int(telemetry.steps - telemetry.skipped_steps)) == (
            0.0,
            int(telemetry.steps),
        )
    # A zero says nothing about the scale of a gradient: the next one is not cut to it.
    params = parameters([0.01, 0.02], [0.02])
    assert float(clipping.clip_(params).clip_coef) == 1.0
    assert params[0].grad.tolist() == torch.tensor([0.01, 0.02]).tolist()


@pytest.mark.parametrize("path", ["host", "device"])
def test_no_gradients(name, path, parameters, device_path, same):
    if path == "device":
        device_path()
    clipping = CLIPPINGS[name]()
    clipping.clip_(parameters([2.0]))
    before = clipping.state_dict()
    telemetry = [clipping.clip_(params) for params in ([], [torch.nn.Parameter(torch.ones(2))], iter(()))]
    assert [int(t.steps) for t in telemetry] == [2, 3, 4]
    assert all((t.grad_norm, t.clip_coef, t.clipped) == (0.0, 1.0, 0.0) for t in telemetry)
    after = clipping.state_dict()
    assert after.pop("steps") == before.pop("steps") + 3
    assert same(after, before)
    assert CLIPPINGS[name]().clip_([]).grad_norm == 0.0
    assert float(CLIPPINGS[name]().clip_(parameters([])).grad_norm) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_gradients(name, dtype, parameters):
    clipping = CLIPPINGS[name]()
    for scale in (1.0, 1e17, 1e18):
        params = parameters([3 * scale, 0.0], [-4 * scale], dtype=dtype)
        telemetry = clipping.clip_(params)
        after = [p.grad for p in params]
        assert all(g.isfinite().all() for g in after)
        assert telemetry.grad_norm == pytest.approx(5 * scale, rel=1e-2)
        assert norm_of(after) == pytest.approx(telemetry.clip_coef * telemetry.grad_norm, rel=1e-2)


def check_bounded(clipping, steps, parameters):
    """Never lengthens a gradient, turns no element's sign, and is the identity where nothing is clipped."""
    for grads in steps:
        params = parameters(*grads)
        telemetry = clipping.clip_(params)
        after = [p.grad for p in params]
        assert 0 <= telemetry.clip_coef <= 1
        assert 0 <= telemetry.clipped <= 1
        for new, old in zip(after, grads, strict=True):
            assert (new.abs() <= old.abs()).all()
            assert (new * old >= 0).all()
        if telemetry.clipped == 0:
            assert telemetry.clip_coef == 1
            assert all(torch.equal(new, old) for new, old in zip(after, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_bounded_is_true(name, dtype, heavy_tailed, parameters):
    if CLIPPINGS[name].bounded:
        check_bounded(CLIPPINGS[name](), heavy_tailed(1, 30, dtype), parameters)


def test_a_false_claim_of_bounded_is_found(name, heavy_tailed, parameters):
    class Normalised(Global):
        def scale_(self, grads, measured, fires):
            coef = measured.threshold / measured.total
            torch._foreach_mul_(grads.tensors, coef)
            return coef, 1.0

    with pytest.raises(AssertionError):
        check_bounded(Clipping(Normalised(), Constant(5.0)), heavy_tailed(1, 30), parameters)


# Not finite.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", ["host", "device"])
def test_skip(name, path, bad, parameters, device_path, same):
    # B16. clip_ alone leaves nothing that an optimizer could step on.
    if path == "device":
        device_path()
    clipping, without = CLIPPINGS[name](), CLIPPINGS[name]()
    for norm in (1.0, 2.0):
        clipping.clip_(parameters([norm], [norm]))
        without.clip_(parameters([norm], [norm]))
    params = parameters([1.0, bad], [2.0])
    telemetry = clipping.clip_(params)
    assert all(p.grad is None if path == "host" else (p.grad == 0).all() for p in params)
    assert not math.isfinite(telemetry.grad_norm)
    assert (float(telemetry.clip_coef), float(telemetry.clipped)) == (1.0, 0.0)
    assert (int(telemetry.steps), int(telemetry.skipped_steps)) == (3, 1)
    # Only the counts show that it was there.
    skipped, never = clipping.state_dict(), without.state_dict()
    assert (skipped.pop("steps"), skipped.pop("skipped_steps")) == (3, 1)
    assert (never.pop("steps"), never.pop("skipped_steps")) == (2, 0)
    assert same(skipped, never)


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_propagate(name, path, bad, parameters, device_path):
    if path == "device":
        device_path()
    clipping = CLIPPINGS[name](nonfinite="propagate")
    clipping.clip_(parameters([1.0], [1.0]))
    before = clipping.state_dict()
    params = parameters([bad], [5.0])
    telemetry = clipping.clip_(params)
    assert not math.isfinite(telemetry.grad_norm)
    if isinstance(clipping.scope, Global):
        # As torch.nn.utils.clip_grad_norm_: NaN goes everywhere; Inf leaves NaN and zeros.
        assert params[0].grad.isnan().all() or name == "no_clip"
        assert params[1].grad.isnan().all() or (bad == math.inf and params[1].grad.item() in (0.0, 5.0))
        assert params[1].grad.item() != 5.0 or name == "no_clip"
    elif name == "layer_wise":
        assert params[0].grad.isnan().all()
        assert params[1].grad.item() == 1.0
    # B16: a history takes only finite norms.
    after = clipping.state_dict()
    assert after["skipped_steps"] == 0
    assert torch.equal(after.get("history", torch.empty(0)), before.get("history", torch.empty(0)))
    assert math.isfinite(clipping.clip_(parameters([3.0], [4.0])).clip_coef)


@pytest.mark.parametrize("path", ["host", "device"])
def test_error_names_the_parameters(name, path, parameters, device_path, same):
    if path == "device":
        device_path()
    clipping = CLIPPINGS[name](nonfinite="error")
    clipping.clip_(parameters([1.0]))
    before = clipping.state_dict()
    params = parameters([1.0], [math.nan, 2.0], [2.0], [math.inf])
    with pytest.raises(NonFiniteGradientError, match="norm is not finite in parameter 1, parameter 3;"):
        clipping.clip_(params)
    assert params[0].grad.item() == 1.0
    assert same(clipping.state_dict(), before)
    with pytest.raises(NonFiniteGradientError, match="parameter 4 and 2 more;"):
        clipping.clip_(parameters(*[math.nan] * 7))
    with pytest.raises(NonFiniteGradientError, match="overflows float32"):
        clipping.clip_(parameters(*[[1.5e19]] * 10))


# State.


def cut(clipping, params, telemetry):
    return [p.grad.clone() for p in params], [float(t) for t in telemetry], clipping.state_dict()


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resuming_repeats_the_run(name, how, path, heavy_tailed, parameters, device_path, same):
    # B11
    if path == "device":
        device_path()
    steps = heavy_tailed(2, 24)
    clipping = CLIPPINGS[name]()
    for grads in steps[:12]:
        clipping.clip_(parameters(*grads))
    if how == "file":
        resumed = CLIPPINGS[name]()
        resumed.load_state_dict(through_file(clipping.state_dict()))
    else:
        resumed = copy.deepcopy(clipping) if how == "deepcopy" else pickle.loads(pickle.dumps(clipping))
    for grads in steps[12:]:
        one, other = parameters(*grads), parameters(*grads)
        wanted = cut(clipping, one, clipping.clip_(one))
        got = cut(resumed, other, resumed.clip_(other))
        assert same(got, wanted)


def test_state_of_another_method_is_refused(name):
    other = next(n for n in CLIPPINGS if n != name)
    with pytest.raises(ValueError, match=f"the state is of {CLIPPINGS[other].__name__}, this clipping is"):
        CLIPPINGS[name]().load_state_dict(CLIPPINGS[other]().state_dict())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_infinite_threshold_is_the_bare_optimizer(name, optimizer, fused, train, weights, same):
    settings = dict(lr=0.1, weight_decay=0.01, fused=fused)
    bare, never = weights(), weights()
    one = optimizer(bare, **settings)
    other = clip(optimizer(never, **settings), never_clipping(name))
    assert all(map(torch.equal, train(one, bare, range(8)), train(other, never, range(8))))
    assert other.clipping.telemetry.clipped_steps == 0
    state, bare_state = other.state_dict(), one.state_dict()
    del state["clipping"]
    assert same(state, bare_state)


def test_foreach_equals_loop(name, train, weights):
    results = []
    for foreach in (True, False):
        params = weights()
        optimizer = clip(torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=foreach), CLIPPINGS[name]())
        results.append(train(optimizer, params, range(8)))
    torch.testing.assert_close(*results)


def test_reading_telemetry_changes_nothing(name, train, weights):
    """Nor does keeping it: what was published at a step still says it at the end."""
    results = []
    for reads in (False, True):
        params = weights()
        optimizer = clip(torch.optim.SGD(params, lr=0.1), CLIPPINGS[name]())
        kept, said = [], []
        for step in range(8):
            train(optimizer, params, range(step, step + 1))
            if reads:
                kept.append(optimizer.clipping.telemetry)
                said.append([float(value) for value in kept[-1]])
        assert [[float(value) for value in telemetry] for telemetry in kept] == said
        results.append([p.detach() for p in params])
    assert all(map(torch.equal, *results))
