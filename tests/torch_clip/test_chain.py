"""Chain: one after the other, as by hand, with one step, one skip and one state."""

import copy
import io
import math
import pickle
import re

import pytest
import torch

from torch_clip import ClippedSGD, ClippedSSTM, Clipping, clip
from torch_clip.chain import Chain
from torch_clip.methods import (
    AGC,
    AdaGC,
    AutoClip,
    CoordWiseClip,
    LayerWiseAutoClip,
    LinearRandAutoClip,
    LinearRandNormClip,
    NoClip,
    NormalizedGrad,
    NormClip,
    SpamClip,
    SpikeGuard,
    StableSpamClip,
    UClip,
    ZClip,
)
from torch_clip.schedules import Linear
from torch_clip.scopes import Global, PerTensor
from torch_clip.testing import check
from torch_clip.thresholds import MovingNorm, Percentile, ZScore

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CHAINS = {
    "values and norm": lambda **k: [CoordWiseClip(3.0, **k), NormClip(2.0, **k)],
    "norm alone": lambda **k: [NormClip(2.0, **k)],
    "two norms": lambda **k: [NormClip(5.0, **k), NormClip(Linear(4.0, 1.0, steps=10), **k)],
    "rows, spikes and norm": lambda **k: [AGC(2.0, **k), ZClip(warmup=5, **k), NormClip(3.0, **k)],
    "histories": lambda **k: [LayerWiseAutoClip(0.7, 8, **k), AutoClip(0.5, **k)],
    "draws": lambda **k: [LinearRandNormClip(2.0, 0.5, **k), LinearRandAutoClip(0.5, 0.5, seed=1, **k)],
    "elements and a carry": lambda **k: [SpamClip(4.0, 0.9, 3, **k), UClip(0.5, **k)],
    "averages": lambda **k: [AdaGC(warmup=5, **k), NormalizedGrad(0.5, **k)],
    "a chain in a chain": lambda **k: [Chain(NormClip(5.0, **k), AutoClip(0.5, **k)), StableSpamClip(**k)],
    "a guard": lambda **k: [SpikeGuard(20.0, 30, 4, **k), AutoClip(0.5, **k)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_it_is_one_after_the_other_by_hand(path, heavy_tailed, parameters, name):
    chain, by_hand = Chain(*CHAINS[name]()), CHAINS[name]()
    assert chain.bounded == all(one.bounded for one in by_hand)
    clipped_steps = 0
    for grads in heavy_tailed(0, 25, long=True):
        one, other = parameters(*grads), parameters(*grads)
        said = chain.clip_(one)
        theirs = [clipping.clip_(other) for clipping in by_hand]
        if path == "host" or not int(chain.telemetry.skipped_steps):
            for a, b in zip(one, other, strict=True):
                if a.grad is not None and b.grad is not None:
                    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)
        for clipping, hers in zip(chain.clippings, theirs, strict=True):
            got = [float(value) for value in clipping.telemetry]
            assert got == pytest.approx([float(value) for value in hers], rel=1e-5)
        norms = [
            math.sqrt(sum(float(g.double().square().sum()) for g in gs))
            for gs in (grads, [p.grad for p in one])
        ]
        assert float(said.grad_norm) == pytest.approx(norms[0], rel=1e-5)
        assert float(said.clip_coef) == pytest.approx(norms[1] / norms[0], rel=1e-4)
        assert float(said.clipped) == float(any(float(hers.clipped) > 0 for hers in theirs))
        clipped_steps += int(said.clipped)
    assert (int(said.steps), int(said.clipped_steps)) == (25, clipped_steps)
    assert clipped_steps > 0


def test_the_threshold_that_is_shown(path, parameters):
    assert float(Chain(CoordWiseClip(1.0), NormClip(7.0)).clip_(parameters([3.0])).threshold) == 7.0
    assert float(Chain(NormClip(7.0), NormClip(5.0)).clip_(parameters([3.0])).threshold) == 5.0
    assert float(Chain(NormClip(5.0), NormClip(7.0)).clip_(parameters([3.0])).threshold) == 5.0
    assert float(Chain(CoordWiseClip(1.0)).clip_(parameters([3.0])).threshold) == 1.0
    assert float(Chain(NoClip()).clip_(parameters([3.0])).threshold) == math.inf


def test_a_step_without_gradients_is_one_for_each(path, parameters):
    """Draws and schedules follow the count of steps: they may not fall behind those of one alone."""
    chain, alone = (
        Chain(NormClip(Linear(10.0, 0.0, steps=10)), NoClip()),
        NormClip(Linear(10.0, 0.0, steps=10)),
    )
    for k in range(6):
        for clipping in (chain, alone):
            said = clipping.clip_(parameters([100.0]) if k % 2 else [])
        assert [int(c.telemetry.steps) for c in chain.clippings] == [k + 1, k + 1]
        assert int(chain.telemetry.steps) == k + 1
    assert float(chain.telemetry.threshold) == float(said.threshold) == 5.0
    optimizer_params = parameters([100.0])
    optimizer = clip(SGD(optimizer_params, lr=0.1), Chain(NormClip(), NoClip()))
    optimizer.zero_grad()
    optimizer.step()
    assert [int(c.telemetry.steps) for c in optimizer.clipping.clippings] == [1, 1]


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("name", [name for name in CHAINS if name != "a guard"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_none_for_any(
    path, heavy_tailed, parameters, same, name, nonfinite, bad
):
    counted = ("steps", "clipped_steps", "skipped_steps")

    def memories(state):
        if isinstance(state, dict):
            return {key: memories(value) for key, value in state.items() if key not in counted}
        return [memories(value) for value in state] if isinstance(state, list) else state

    chain = Chain(*CHAINS[name](nonfinite=nonfinite))
    for grads in heavy_tailed(1, 12):
        chain.clip_(parameters(*grads))
    before = copy.deepcopy(memories(chain.state_dict()))
    for place in range(3):
        grads = [g.clone() for g in grads]
        grads[place].view(-1)[0] = bad
        params = parameters(*grads)
        chain.clip_(params)
        if nonfinite == "skip":
            assert all(p.grad is None or not p.grad.any() for p in params)
        if not (name == "elements and a carry" and nonfinite == "propagate"):
            assert same(memories(chain.state_dict()), before)
        grads[place].view(-1)[0] = 0.0
    skips = 3 if nonfinite == "skip" else 0
    assert int(chain.telemetry.skipped_steps) == skips
    assert [int(c.telemetry.skipped_steps) for c in chain.clippings] == [skips] * len(chain.clippings)


def test_error_names_the_parameter(path, parameters):
    chain = Chain(NormClip(nonfinite="error"), AutoClip(nonfinite="error"))
    with pytest.raises(RuntimeError, match="the gradient norm is not finite in parameter 1"):
        chain.clip_(parameters([1.0], [math.nan]))
    assert chain.clippings[1].telemetry is None


# State.


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", CHAINS)
def test_resuming(path, heavy_tailed, parameters, same, name, how):
    one = Chain(*CHAINS[name]())
    stream = heavy_tailed(2, 24)
    for grads in stream[:13]:
        one.clip_(parameters(*grads))
    if how == "file":
        other = Chain(*CHAINS[name]())
        other.load_state_dict(through_file(one.state_dict()))
    else:
        other = copy.deepcopy(one) if how == "deepcopy" else pickle.loads(pickle.dumps(one))
    for grads in stream[13:]:
        params, others = parameters(*grads), parameters(*grads)
        assert same(tuple(other.clip_(others)), tuple(one.clip_(params)))
        assert all(same(a.grad, b.grad) for a, b in zip(others, params, strict=True))
    assert same(other.state_dict(), one.state_dict())
    state = one.state_dict()
    assert state["method"] == "Chain"
    assert [its["method"] for its in state["clippings"]] == [type(c).__name__ for c in one.clippings]
    other.reset()
    assert other.telemetry is None
    fresh = Chain(*CHAINS[name]()).state_dict()
    assert same(other.state_dict(), fresh)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Chain(AutoClip(), NormClip()), "the state is of NormClip, this clipping is AutoClip"),
        (lambda: Chain(NormClip()), "the state is of a chain of 2, this one has 1"),
        (lambda: Chain(NormClip(), AutoClip(), NormClip()), "the state is of a chain of 2, this one has 3"),
        (lambda: Chain(NormClip(), Chain(AutoClip())), "the state is of AutoClip, this clipping is Chain"),
        (lambda: AutoClip(), "the state is of Chain, this clipping is AutoClip"),
    ],
)
def test_a_state_of_another_chain_is_refused_before_anything_is_loaded(
    path, parameters, same, train, weights, other, message
):
    params, others = weights(), weights()
    optimizer = clip(SGD(params, lr=0.1, momentum=0.9), Chain(NormClip(), AutoClip()))
    train(optimizer, params, range(5))
    wrong = clip(SGD(others, lr=0.5, momentum=0.9), other())
    train(wrong, others, range(3))
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong.load_state_dict(optimizer.state_dict())
    assert same(wrong.state_dict(), before)


def test_a_state_of_other_parts_is_refused_before_anything_is_loaded(path, heavy_tailed, parameters, same):
    """Of what is put together from parts the name of the class says nothing: the memory must fit."""
    makes = [
        lambda: Clipping(Global(), ZScore()),
        lambda: Clipping(PerTensor(), ZScore()),
        lambda: Clipping(PerTensor(), MovingNorm()),
        lambda: Clipping(PerTensor(), Percentile(0.5, 5)),
        lambda: Clipping(Global(), Percentile(0.5)),
    ]
    for i, make in enumerate(makes):
        one = Chain(NormClip(), make())
        for grads in heavy_tailed(0, 4):
            one.clip_(parameters(*grads))
        for k, make_other in enumerate(makes):
            other = Chain(NormClip(), make_other())
            for grads in heavy_tailed(0, 2):
                other.clip_(parameters(*grads))
            before = copy.deepcopy(other.state_dict())
            if i == k:
                other.load_state_dict(one.state_dict())
                continue
            with pytest.raises(ValueError, match="the state"):
                other.load_state_dict(one.state_dict())
            assert same(other.state_dict(), before)


# Attached.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "settings"), [(SGD, {"momentum": 0.9}), (AdamW, {})], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", CHAINS)
def test_attached_it_is_clipping_by_hand(path, train, weights, name, kind, settings, fused):
    one, two = weights(), weights()
    clipped = clip(kind(one, lr=0.1, fused=fused, **settings), Chain(*CHAINS[name]()))
    plain, by_hand = kind(two, lr=0.1, fused=fused, **settings), CHAINS[name]()
    for step in range(10):
        train(clipped, one, range(step, step + 1))
        rng = torch.Generator().manual_seed(step)
        for param in two:
            param.grad = torch.randn(param.shape, generator=rng) * (30 if step % 3 == 2 else 1)
        skipped = []
        for clipping in by_hand:
            before = 0 if clipping.telemetry is None else int(clipping.telemetry.skipped_steps)
            skipped.append(int(clipping.clip_(two).skipped_steps) > before)
            if skipped[-1]:
                break
        if not any(skipped):
            plain.step()
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_with_a_grad_scaler(path, fused, unscale):
    param = torch.nn.Parameter(torch.ones(3))
    chain = Chain(CoordWiseClip(2.0), AutoClip(0.5))
    optimizer = clip(AdamW([param], lr=0.1, fused=fused), chain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(6):
        optimizer.zero_grad()
        scaler.scale((param * (1.0 + k)).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert float(chain.telemetry.grad_norm) == pytest.approx(6 * math.sqrt(3), rel=1e-5)
    history = chain.clippings[1].threshold.history.tolist()
    assert history == pytest.approx([math.sqrt(3)] + [2 * math.sqrt(3)] * 5, rel=1e-5)


def test_a_state_goes_with_the_optimizer(path, train, weights, same):
    params, others = weights(), weights()
    make = lambda: Chain(SpikeGuard(20.0, 30, 4), AdaGC(warmup=3), AutoClip(0.5))  # noqa: E731
    one, other = clip(AdamW(params, lr=0.1), make()), clip(AdamW(others, lr=0.1), make())
    values = train(one, params, range(10))
    other.load_state_dict(through_file(one.state_dict()))
    with torch.no_grad():
        for param, value in zip(others, values, strict=True):
            param.copy_(value)
    assert same(train(other, others, range(10, 20)), train(one, params, range(10, 20)))
    assert same(other.state_dict(), one.state_dict())


# What may be in a chain.


def test_what_cannot_be_in_a_chain_is_refused():
    with pytest.raises(ValueError, match="a chain needs at least one clipping"):
        Chain()
    for wrong in (NormClip, 1.0, "norm", [NormClip()]):
        with pytest.raises(TypeError, match=r"a chain is of clippings such as NormClip\(1.0\), got"):
            Chain(NormClip(), wrong)
    with pytest.raises(ValueError, match="all of a chain need the same nonfinite, got propagate, skip"):
        Chain(NormClip(), AutoClip(nonfinite="propagate"))
    with pytest.raises(ValueError, match="same nonfinite"):
        Chain(NormClip(), Chain(NormClip(nonfinite="error")))
    same = AutoClip()
    with pytest.raises(ValueError, match="twice"):
        Chain(same, same)


def test_one_that_does_not_measure(path, parameters):
    """Its norms are NaN; the chain knows its own, or says that it will not."""
    quick = CoordWiseClip(1.0, nonfinite="propagate", measure=False)
    norm = NormClip(1.0, nonfinite="propagate")
    for clippings in ((quick, norm), (norm, quick)):
        try:
            chain = Chain(*clippings)
        except ValueError:
            continue
        params = parameters([3.0, 4.0])
        said = chain.clip_(params)
        assert float(said.grad_norm) == 5.0
        assert float(said.clip_coef) == pytest.approx(params[0].grad.norm().item() / 5)
        assert type(chain.state_dict()["clipped_steps"]) is int


def test_repr_says_the_parts():
    assert repr(Chain(NormClip(2), CoordWiseClip(1))) == (
        "Chain(NormClip(Global(), Constant(2), Always(), nonfinite='skip'), "
        "CoordWiseClip(Element(), Constant(1), Always(), nonfinite='skip'))"
    )


def test_sstm_schedules_a_threshold_of_its_own(parameters):
    with pytest.raises(ValueError, match="SSTM schedules the threshold, and Chain finds its own"):
        ClippedSSTM(parameters([1.0]), lr=0.1, L=1.0, clipping=Chain(NormClip()))
    assert ClippedSGD(parameters([1.0]), lr=0.1, clipping=Chain(NormClip())).clipping.unit == "steps"


BRIEFLY = [
    "zero_gradient",
    "no_gradients",
    "huge_gradient",
    "not_finite",
    "bounded",
    "telemetry",
    "no_host_read",
]


def zclip_and_norm():
    return Chain(ZClip(warmup=5), NormClip(1.0))


def rows_and_values():
    return Chain(AGC(0.5, exclude=None), CoordWiseClip(0.2))


def guard_and_average():
    return Chain(SpikeGuard(sigma=50.0, window=20, min_history=4), AdaGC(warmup=3))


@pytest.mark.parametrize("make", [zclip_and_norm, rows_and_values, guard_and_average])
def test_the_laws(make, device_path):
    device_path()
    for verdict in check(make, BRIEFLY):
        assert verdict.status in ("passed", "not claimed"), f"{verdict.law}: {verdict.message}"
