"""SpikeGuard: exact skips on a one-sided score, never poisoned, and an end to endless skipping."""

import io
import math
import re

import numpy as np
import pytest
import torch

from torch_clip import NonFiniteGradientError, clip
from torch_clip.chain import Chain
from torch_clip.methods import AutoClip, NormClip, SpikeGuard
from torch_clip.spike_guard import SpikeError

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
OPTIMIZERS = [(SGD, {"momentum": 0.9}), (SGD, {"momentum": 0.9, "nesterov": True}), (AdamW, {})]


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def step(clipping, norm, loss=None, dtype=torch.float64):
    """A step with a gradient of this norm; whether it was let through, and telemetry."""
    param = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    param.grad = torch.tensor([0.6 * norm, 0.8 * norm], dtype=dtype)
    before = param.grad.clone()
    if loss is not None:
        clipping.observe(torch.tensor(loss, dtype=torch.float64))
    said = clipping.clip_([param])
    through = param.grad is not None and torch.equal(param.grad, before)
    if math.isfinite(norm):
        assert through or param.grad is None or not param.grad.any()
    return through, said


def filled(norms=(1.0, 3.0) * 64, **settings):
    clipping = SpikeGuard(**settings)
    for norm in norms:
        assert step(clipping, norm)[0]
    return clipping


def until_error(act, most):
    """How many times it went well, and the message of the SpikeError then."""
    for count in range(most):
        try:
            act()
        except SpikeError as error:
            return count, str(error)
    raise AssertionError(f"no SpikeError in {most} steps")


# The score.


def test_worked_value(path):
    deviation = np.std([1.0, 3.0] * 64, ddof=1)
    assert [(norm - 2) / deviation for norm in (8.0, 8.1)] == pytest.approx([5.976, 6.076], abs=1e-3)
    for norm, passes in ((8.0, True), (8.1, False)):
        through, said = step(filled(), norm)
        assert through == passes
        assert (float(said.grad_norm), float(said.clip_coef)) == (pytest.approx(norm), 1.0)
        assert float(said.threshold) == pytest.approx(2 + 6 * deviation, abs=1e-4)
        assert (int(said.steps), int(said.skipped_steps), int(said.clipped_steps)) == (129, 1 - passes, 0)


def test_it_is_one_sided(path):
    assert step(filled([100.0, 101.0] * 64), 1e-6)[0]
    guard = SpikeGuard(watch="loss", min_history=10)
    for k in range(40):
        assert step(guard, 1.0, 5.0 + k % 2)[0]
    assert step(guard, 1.0, -1e9)[0]


def test_it_follows_its_formula(path):
    """Against NumPy: the window holds the last values let through, the current one apart."""
    rng = np.random.default_rng(0)
    guard, window, skipped = SpikeGuard(sigma=3.0, window=20, min_history=5), [], 0
    for norm in np.abs(rng.standard_t(2, 400)) + 1.0:
        last = np.array(window[-20:])
        bound = last.mean() + 3 * (last.std(ddof=1) + 1e-6 * last.mean()) if len(last) >= 5 else math.inf
        through, said = step(guard, norm)
        assert through == (norm <= bound)
        assert float(said.threshold) == pytest.approx(bound, rel=1e-9)
        skipped += not through
        if through:
            window.append(norm)
    assert int(said.skipped_steps) == skipped > 5


def test_nothing_is_skipped_before_there_is_a_history(path):
    guard = SpikeGuard(min_history=10, window=16)
    for norm in (1.0, 1e9, 1.0, 1e-9, 5.0, 1e12):
        through, said = step(guard, norm)
        assert through
        assert float(said.threshold) == math.inf
    assert int(said.skipped_steps) == 0


def test_equal_norms_are_no_spikes(path):
    for norm in (1.0, 0.1, 1e-5, 1e5):
        guard = SpikeGuard()
        for _ in range(80):
            assert step(guard, norm, dtype=torch.float32)[0]
        assert not step(guard, norm * 1.1)[0]


def test_a_skipped_value_is_not_looked_back_on(path):
    guard = filled()
    for _ in range(20):
        assert not step(guard, 50.0)[0]
        assert step(guard, 2.0)[0]
    assert not step(guard, 50.0)[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_poisons(path, bad):
    clean, spoilt = SpikeGuard(window=20, min_history=5), SpikeGuard(window=20, min_history=5)
    rng = np.random.default_rng(1)
    for k, norm in enumerate(np.abs(rng.standard_t(3, 100)) + 1.0):
        if k % 7 == 0:
            through, said = step(spoilt, bad)
            assert not through
            assert not math.isfinite(float(said.grad_norm))
        assert step(spoilt, norm)[0] == step(clean, norm)[0]
        assert float(spoilt.telemetry.threshold) == float(clean.telemetry.threshold)
    # Under propagate a gradient that is not finite is let through, and still not recorded.
    guard = SpikeGuard(window=20, min_history=5, nonfinite="propagate")
    for norm in (1.0, 2.0, bad, 1.0, 2.0, 1.0, bad):
        said = step(guard, norm)[1]
    assert int(said.skipped_steps) == 0
    assert not step(guard, 100.0)[0]
    guard = SpikeGuard(nonfinite="error")
    with pytest.raises(NonFiniteGradientError):
        step(guard, bad)


# The loss.


def test_the_loss_is_observed(path):
    guard = SpikeGuard(watch="loss", window=20, min_history=10)
    for k in range(20):
        assert step(guard, 10.0 ** (k % 5), 2.0 + k % 2)[0]  # of norms nothing is asked
    assert not step(guard, 1.0, 20.0)[0]
    assert step(guard, 1.0, 3.0)[0]
    for bad in (math.nan, math.inf):
        assert not step(guard, 1.0, bad)[0]
        assert step(guard, 1.0, 2.5)[0]
    assert int(guard.telemetry.skipped_steps) == 3
    assert float(guard.telemetry.threshold) == math.inf  # there is no bound on the norm
    # A loss that is not finite is a spike from the first step on.
    assert not step(SpikeGuard(watch="loss"), 1.0, math.nan)[0]


@pytest.mark.parametrize("loss", [0.0, -3.0])
def test_a_loss_may_be_zero_or_negative(path, loss):
    guard = SpikeGuard(watch="loss", window=20, min_history=10)
    for k in range(20):
        assert step(guard, 1.0, loss + 0.1 * (k % 2))[0]
    assert not step(guard, 1.0, 50.0)[0]
    guard = SpikeGuard(watch="loss", window=20, min_history=10)
    for _ in range(20):
        assert step(guard, 1.0, loss)[0]
    assert not step(guard, 1.0, 50.0)[0]


def test_both_are_looked_at(path):
    for norm, loss, passes in ((1.0, 2.0, True), (9.0, 2.0, False), (1.0, 9.0, False), (9.0, 9.0, False)):
        guard = SpikeGuard(watch=("grad_norm", "loss"), window=20, min_history=10)
        for k in range(20):
            assert step(guard, 1.0 + 0.1 * (k % 2), 2.0 + 0.1 * (k % 2))[0]
        assert step(guard, norm, loss)[0] == passes
        # Neither value of a skipped step is remembered.
        assert len(through_file(guard.state_dict())["histories"]["loss"]) == 20
        assert guard.state_dict()["histories"]["loss"].max() < 3
        assert guard.state_dict()["histories"]["grad_norm"].max() < 3


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_closure_tells_the_loss(path, kind):
    param = torch.nn.Parameter(torch.ones(2))
    guard = SpikeGuard(watch="loss", window=20, min_history=10)
    optimizer = clip(kind([param], lr=0.01), guard)

    def run(loss):
        def closure():
            optimizer.zero_grad()
            (param.sum() * 1.0).backward()
            return torch.tensor(loss, requires_grad=True) * 1.0

        before = param.detach().clone()
        assert optimizer.step(closure).item() == pytest.approx(loss)
        return not torch.equal(before, param)

    for k in range(20):
        assert run(1.0 + 0.1 * (k % 2))
    assert not run(100.0)
    assert run(1.0)


def test_an_unobserved_loss_is_a_clear_error(path):
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = clip(SGD([param], lr=0.1), SpikeGuard(watch=("grad_norm", "loss")))
    param.grad = torch.ones(2)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"tell it before each step by optimizer\.clipping\.observe\(loss\)"
        ):
            optimizer.step()
        assert param.tolist() == [1.0, 1.0]
    optimizer.clipping.observe(torch.tensor(1.0, requires_grad=True))
    optimizer.step()
    assert param[0].item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="observe"):  # that of the last step is not this one's
        optimizer.step()
    # It is not asked of a step without gradients, nor is what was told then kept for another.
    guard = SpikeGuard(watch="loss", window=20, min_history=10)
    guard.observe(torch.tensor(1.0))
    guard.clip_([])
    assert int(guard.telemetry.steps) == 1


@pytest.mark.parametrize("loss", [2.0, torch.tensor([2.0]), np.float64(2.0), torch.tensor(2.0).double()])
def test_a_loss_in_another_form(path, loss):
    """A number, or a tensor of one element: what `loss.item()` and a mean with keepdim give."""
    guard = SpikeGuard(watch="loss")
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    guard.observe(loss)
    guard.clip_([param])
    assert guard.state_dict()["histories"]["loss"].tolist() == [2.0]


# A skip is exact.


def snapshot(optimizer, params):
    state = {
        k: {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in s.items()}
        for k, s in optimizer.state_dict()["state"].items()
    }
    return [param.detach().clone() for param in params], state


@pytest.mark.parametrize("bad", [1e4, math.nan, math.inf])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS, ids=["momentum", "nesterov", "adamw"])
def test_a_skipped_step_touches_nothing(path, weights, train, same, kind, settings, fused, bad):
    params = weights()
    guard = SpikeGuard(sigma=20.0, window=30, min_history=5)
    optimizer = clip(kind(params, lr=0.1, weight_decay=0.1, fused=fused, **settings), guard)
    train(optimizer, params, range(10))
    assert int(guard.telemetry.skipped_steps) == 0
    before = snapshot(optimizer, params)
    for at in range(3):
        for param in params:
            param.grad = torch.full_like(param, 1.0)
        params[at].grad.view(-1)[0] = bad
        optimizer.step()
        assert same(snapshot(optimizer, params), before)
    assert int(guard.telemetry.skipped_steps) == 3
    assert all(not hasattr(optimizer, name) for name in ("found_inf", "grad_scale"))
    # And the next goes on as if there had been none.
    others = weights()
    bare = kind(others, lr=0.1, weight_decay=0.1, fused=fused, **settings)
    train(bare, others, range(10))
    train(bare, others, range(10, 14))
    train(optimizer, params, range(10, 14))
    assert same(snapshot(optimizer, params), snapshot(bare, others))


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_step_may_be_the_skipped_one(path, weights, train, same, fused):
    """By a loss that is not finite: momentum buffers that are made then must be zero."""
    params, others = weights(), weights()
    optimizer = clip(SGD(params, lr=0.1, momentum=0.9, fused=fused), SpikeGuard(watch="loss"))
    bare = SGD(others, lr=0.1, momentum=0.9, fused=fused)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.clipping.observe(torch.tensor(math.nan))
    optimizer.step()
    assert all(map(torch.equal, params, others))
    for k in range(3):
        optimizer.clipping.observe(torch.tensor(1.0))
        train(optimizer, params, range(k, k + 1))
        train(bare, others, range(k, k + 1))
    torch.testing.assert_close(params, others, rtol=0, atol=0)


def test_without_spikes_it_is_the_bare_optimizer(path, weights, train, same):
    for kind, settings in OPTIMIZERS:
        for fused in (False, True):
            params, others = weights(), weights()
            guarded = clip(kind(params, lr=0.1, fused=fused, **settings), SpikeGuard(sigma=1e6))
            bare = kind(others, lr=0.1, fused=fused, **settings)
            train(guarded, params, range(12))
            train(bare, others, range(12))
            assert same(snapshot(guarded, params), snapshot(bare, others))


# Skips in a row.


def test_it_stops_after_so_many_in_a_row(path):
    guard = filled(max_consecutive=5)
    count, message = until_error(lambda: step(guard, 50.0), 10)
    assert count == 4 if path == "host" else 4 <= count < 10
    last = 128 + count  # steps are counted from 0
    assert re.search(
        rf"{count + 1} steps in a row were skipped; grad_norm 50 at step {last} is far above the last ones, "
        r"of mean 2 and standard deviation 1\.003",
        message,
    )
    # It stays an error, unless something is let through.
    assert until_error(lambda: step(guard, 50.0), 5)[0] < 5
    other = filled(max_consecutive=1)
    count, message = until_error(lambda: step(other, 50.0), 2)
    assert (count, message[:29]) == (0, "1 steps in a row were skipped")


def test_a_step_let_through_begins_the_row_anew(path):
    guard = filled(max_consecutive=5)
    for _ in range(12):
        for _ in range(4):
            step(guard, 50.0)
        assert step(guard, 2.0)[0]
    assert int(guard.telemetry.skipped_steps) == 48
    endless = filled(max_consecutive=None)
    for _ in range(250):
        assert not step(endless, 50.0)[0]
    assert int(endless.telemetry.skipped_steps) == 250


def test_gradients_that_are_not_finite_count_too(path):
    guard, values = filled(max_consecutive=4), iter([50.0] + [math.nan] * 8)
    _, message = until_error(lambda: step(guard, next(values)), 8)
    assert re.search(r"\d steps in a row were skipped; the gradient of step 13\d is not finite", message)
    guard = SpikeGuard(watch="loss", max_consecutive=3)
    _, message = until_error(lambda: step(guard, 1.0, math.nan), 6)
    assert re.search(r"\d steps in a row were skipped; the loss of step \d is not finite: nan", message)


@pytest.mark.parametrize("fused", [False, True])
def test_an_error_leaves_the_optimizer_whole(path, weights, train, fused):
    params = weights()
    guard = SpikeGuard(sigma=20.0, window=30, min_history=5, max_consecutive=2)
    optimizer = clip(SGD(params, lr=0.1, momentum=0.9, fused=fused), guard)
    train(optimizer, params, range(10))
    before = [param.detach().clone() for param in params]

    def spike():
        for param in params:
            param.grad = torch.full_like(param, 1e6)
        optimizer.step()

    until_error(spike, 4)
    assert all(map(torch.equal, params, before))
    assert not hasattr(optimizer, "found_inf")
    train(optimizer, params, range(10, 12))
    assert not any(map(torch.equal, params, before))


# State.


@pytest.mark.parametrize("after", [0, 3, 30, 71, 90])
@pytest.mark.parametrize("watch", ["grad_norm", "loss", ("loss", "grad_norm")])
def test_resuming_through_a_file(path, same, after, watch):
    def make():
        return SpikeGuard(sigma=3.0, window=20, min_history=5, watch=watch, max_consecutive=None)

    one, other = make(), make()
    rng = np.random.default_rng(2)
    stream = [(abs(a) + 1.0, b) for a, b in rng.standard_t(2, (130, 2))]
    stream[70:72] = [(1e9, 1e9), (math.nan, math.nan)]  # resumed in the middle of a row of skips
    tell = "loss" in watch
    for norm, loss in stream[:after]:
        step(one, norm, loss if tell else None)
    other.load_state_dict(through_file(one.state_dict()))
    for norm, loss in stream[after:]:
        loss = loss if tell else None
        wanted, got = step(one, norm, loss), step(other, norm, loss)
        assert got[0] == wanted[0]
        assert same(tuple(got[1]), tuple(wanted[1]))
    assert same(other.state_dict(), one.state_dict())


def test_the_row_of_skips_is_resumed(path):
    guard = filled(max_consecutive=6)
    for _ in range(4):
        step(guard, 50.0)
    other = SpikeGuard(max_consecutive=6)
    other.load_state_dict(through_file(guard.state_dict()))
    count, message = until_error(lambda: step(other, 50.0), 8)
    assert "steps in a row were skipped; grad_norm 50 at step 1" in message
    assert count == 1 if path == "host" else count < 8


def test_a_state_of_one_path_goes_on_on_the_other(device_path):
    norms = np.abs(np.random.default_rng(3).standard_t(2, 120)) + 1.0
    one = SpikeGuard(sigma=3.0, window=20, min_history=5)
    for norm in norms[:50]:
        step(one, norm)
    state = through_file(one.state_dict())
    wanted = [step(one, norm)[0] for norm in norms[50:]]
    assert not all(wanted)
    device_path()
    other = SpikeGuard(sigma=3.0, window=20, min_history=5)
    other.load_state_dict(state)
    assert [step(other, norm)[0] for norm in norms[50:]] == wanted


def test_windows_of_another_size_when_loading(path):
    guard = filled(np.linspace(1.0, 9.0, 200).tolist(), sigma=1e6)
    short = SpikeGuard(window=20, min_history=20)
    short.load_state_dict(through_file(guard.state_dict()))
    last = np.linspace(1.0, 9.0, 200)[-20:]
    assert float(step(short, 1.0)[1].threshold) == pytest.approx(last.mean() + 6 * last.std(ddof=1), rel=1e-4)
    long = SpikeGuard(window=500, min_history=20)
    long.load_state_dict(through_file(guard.state_dict()))
    last = np.linspace(1.0, 9.0, 200)[-128:]
    assert float(step(long, 1.0)[1].threshold) == pytest.approx(last.mean() + 6 * last.std(ddof=1), rel=1e-4)


# With others.


def test_it_goes_first_in_a_chain():
    assert Chain(SpikeGuard(), NormClip()).clippings[1].unit == "steps"
    Chain(Chain(SpikeGuard(), NormClip()), NormClip())
    for wrong in (
        lambda: Chain(NormClip(), SpikeGuard()),
        lambda: Chain(SpikeGuard(), SpikeGuard()),
        lambda: Chain(NormClip(), Chain(SpikeGuard(), NormClip())),
        lambda: Chain(NormClip(), Chain(Chain(SpikeGuard()), NormClip())),
    ):
        with pytest.raises(ValueError, match="SpikeGuard goes first: a step cannot be skipped once"):
            wrong()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("watch", ["grad_norm", "loss"])
def test_in_a_chain_a_skip_is_none_for_the_others(path, weights, train, same, fused, watch):
    """Their histories, and with them the parameters, are those of a run without the skipped steps."""
    runs = []
    for spikes in (False, True):
        params = weights()
        chain = Chain(SpikeGuard(sigma=20.0, window=30, min_history=5, watch=watch), AutoClip(0.5))
        optimizer = clip(SGD(params, lr=0.1, momentum=0.9, fused=fused), chain)
        for k in range(20):
            if spikes and k in (8, 9, 15):
                before = [param.detach().clone() for param in params]
                for param in params:
                    param.grad = torch.full_like(param, 1e4 if k != 9 else math.inf)
                chain.observe(torch.tensor(1e4 if k != 9 else 1.0))
                optimizer.step()
                assert all(map(torch.equal, params, before))
            chain.observe(torch.tensor(1.0 + 0.1 * (k % 3)))
            train(optimizer, params, range(k, k + 1))
        runs.append((params, chain))
    (one, plain), (other, guarded) = runs
    assert all(map(torch.equal, other, one))
    assert torch.equal(guarded.clippings[1].threshold.history, plain.clippings[1].threshold.history)
    assert int(guarded.telemetry.skipped_steps) == 3
    assert [int(c.telemetry.skipped_steps) for c in guarded.clippings] == [3, 3]
    assert [int(c.telemetry.steps) for c in guarded.clippings] == [23, 23]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_with_a_grad_scaler(path, fused, unscale):
    """Norms are those without the scale; its own skips are not spikes, and ours do not change the scale."""
    param = torch.nn.Parameter(torch.ones(3))
    guard = SpikeGuard(sigma=6.0, window=30, min_history=5)
    optimizer = clip(AdamW([param], lr=0.1, fused=fused), guard)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    changed, scales = [], []
    for k in range(20):
        optimizer.zero_grad()
        factor = {12: 100.0, 15: math.inf}.get(k, 1.0 + 0.1 * (k % 2))
        scaler.scale((param * factor).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        changed.append(not torch.equal(param, before))
        scales.append(scaler.get_scale())
        if factor < 100:
            assert float(guard.telemetry.grad_norm) == pytest.approx(factor * math.sqrt(3), rel=1e-4)
    assert [k for k in range(20) if not changed[k]] == [12, 15]
    assert scales == [1024.0] * 15 + [512.0] * 5
    assert float(guard.telemetry.threshold) < 3
    # Where it is not fused the scaler does not call the optimizer.
    assert int(guard.telemetry.skipped_steps) == (2 if fused else 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0}, "sigma must be in (0, inf], got 0"),
        ({"sigma": math.nan}, "sigma must be in (0, inf], got nan"),
        ({"window": 1}, "window must be a whole number from 2, got 1"),
        ({"window": math.inf}, "window must be a whole number from 2, got inf"),
        ({"min_history": 1}, "min_history must be a whole number from 2, got 1"),
        ({"window": 32}, "min_history must be at most window=32, got 64"),
        ({"watch": "norm"}, "watch takes grad_norm, loss, got 'norm'"),
        ({"watch": ()}, "watch takes grad_norm, loss, got ()"),
        ({"max_consecutive": 0}, "max_consecutive must be a whole number from 1, got 0"),
        ({"nonfinite": "zero"}, "nonfinite must be one of"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SpikeGuard(**settings)


def test_huge_values_before_there_is_a_history(path):
    """Let through, as nothing is known yet; their squares overflow even float64."""
    guard = SpikeGuard(window=20, min_history=5, watch="loss")
    for loss in (1e200, 1.0, 1e200, 2.0, 1e300, 1.0, 2.0):
        assert step(guard, 1.0, loss)[0]


def test_a_sigma_of_infinity_skips_nothing_finite(path):
    guard = filled([1.0] * 64, sigma=math.inf)
    assert step(guard, 1e18)[0]
    assert not step(guard, math.inf)[0]
