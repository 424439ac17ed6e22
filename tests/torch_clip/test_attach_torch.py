"""Clipping in front of torch's optimizers: equal to clip_grad_norm_ and a step; a skip that is one."""

import copy
import inspect

import pytest
import torch

from torch_clip import CLIPPINGS, clip
from torch_clip.methods import AutoClip, CoordWiseClip, LayerWiseClip, LinearRandAutoClip, NormClip

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]
# What CLIPPING.md says of momentum, weight decay and their kin is torch's, so they are only switched on here.
SETTINGS = [
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9)),
    ("SGD", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.3, maximize=True)),
    ("Adam", dict(lr=0.01, weight_decay=0.1)),
    ("AdamW", dict(lr=0.01, weight_decay=0.1, amsgrad=True)),
    ("Adagrad", dict(lr=0.1)),
]
TOLERANCE = dict(rtol=1e-4, atol=1e-5)  # Adam divides by the gradient's own size, which magnifies roundoff


def by_hand(optimizer, params, max_norm):
    def hook(*_):
        torch.nn.utils.clip_grad_norm_(params, max_norm)

    optimizer.register_step_pre_hook(hook)
    return optimizer


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("mode", ["fused", "foreach", "loop"])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_norm_clip_is_clip_grad_norm(name, settings, mode, path, train, weights, device_path):
    # B1, B2, B14: the gradient is clipped before momentum, weight decay and all else that torch's class does.
    settings = {**settings, "fused": mode == "fused", "foreach": mode == "foreach"}
    plain, clipped = weights(), weights()
    wanted = train(by_hand(OPTIMIZERS[name](plain, **settings), plain, 2.0), plain, range(9))
    if path == "device":
        device_path()
    optimizer = clip(OPTIMIZERS[name](clipped, **settings), NormClip(2.0))
    torch.testing.assert_close(train(optimizer, clipped, range(9)), wanted, **TOLERANCE)
    assert 3 <= optimizer.clipping.telemetry.clipped_steps < 10
    for one, other in zip(clipped, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)  # fused or not, what a logger finds is clipped


@pytest.mark.parametrize(
    "clipping", [NormClip(1.0), LayerWiseClip(1.0), CoordWiseClip(1.0)], ids=["norm", "layer", "coordinate"]
)
def test_a_spike_is_removed_and_not_delayed(clipping, parameters):
    # B1, B2: momentum 0.9, one gradient of 1000, then 0.1. The buffer takes the clipped 1.
    params = parameters([0.0])
    optimizer = clip(torch.optim.SGD(params, lr=1.0, momentum=0.9), clipping)
    buffer, expected, seen = 0.0, 1.0, []
    for grad in (1000.0, 0.1, 0.1, 0.1):
        params[0].grad = torch.tensor([grad])
        optimizer.step()
        buffer = 0.9 * buffer + min(1.0, grad)
        expected -= buffer
        seen.append(params[0].item())
        assert seen[-1] == pytest.approx(expected, rel=1e-5)
    assert optimizer.state[params[0]]["momentum_buffer"].item() == pytest.approx(buffer, rel=1e-5)


def problem(name):
    """Parameters for a class of torch.optim, and a closure that gives them gradients at each step.

    In float64, because the line search of LBFGS would magnify the roundoff of float32.
    """
    rng = torch.Generator().manual_seed(0)
    if name == "SparseAdam":
        table = torch.nn.Parameter(torch.randn(6, 3, generator=rng, dtype=torch.float64))

        def closure():
            table.grad = None
            rows = torch.tensor([0, 2, 2, 5])
            loss = (torch.nn.functional.embedding(rows, table, sparse=True) ** 2).sum() * 3
            loss.backward()
            return loss

        return [table], closure
    shapes = [(4, 3), (2, 5)] if name == "Muon" else [(4, 3), (5,)]
    params = [torch.nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64)) for s in shapes]

    def closure():
        for param in params:
            param.grad = None
        loss = sum(((p - 1) ** 4).sum() for p in params)
        loss.backward()
        return loss

    return params, closure


def test_the_walk_meets_every_class():
    """Those unlike the others too: LBFGS evaluates many times, SparseAdam and Muon want their gradients."""
    assert {"LBFGS", "SparseAdam", "Muon", "Adafactor"} <= set(OPTIMIZERS)
    assert set(FUSED) == {name for name, cls in OPTIMIZERS.items() if knows(cls, "fused")}


def knows(cls, keyword):
    return keyword in inspect.signature(cls).parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_class_of_torch_optim(name):
    plain, plain_closure = problem(name)
    clipped, closure = problem(name)
    settings = dict(lr=0.05, **({"line_search_fn": "strong_wolfe"} if name == "LBFGS" else {}))
    reference = OPTIMIZERS[name](plain, **settings)
    optimizer = clip(OPTIMIZERS[name](clipped, **settings), NormClip(1.0))

    def clipped_by_hand():
        loss = plain_closure()
        if name == "SparseAdam":
            plain[0].grad = plain[0].grad.coalesce()
        grads = [p.grad._values() if p.grad.is_sparse else p.grad for p in plain]
        norm = sum((g**2).sum() for g in grads).sqrt().item()
        for grad in grads:
            grad.mul_(min(1.0, 1.0 / norm))
        return loss

    for _ in range(6):
        torch.testing.assert_close(optimizer.step(closure), reference.step(clipped_by_hand))
    torch.testing.assert_close(clipped, plain)
    assert optimizer.clipping.telemetry.clipped_steps > 0


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_class_with_every_method(name, clipping):
    """It steps, is copied with its clipping, and the copy goes on as the original does."""
    params, closure = problem(name)
    optimizer = clip(OPTIMIZERS[name](params, lr=0.01), CLIPPINGS[clipping]())
    if name == "SparseAdam" and clipping in ("spam", "uclip"):
        with pytest.raises(
            ValueError, match="has a sparse gradient; a memory of each element needs dense ones"
        ):
            optimizer.step(closure)
        return
    for _ in range(3):
        optimizer.step(closure)
    assert int(optimizer.clipping.telemetry.steps) >= 3
    assert all(param.isfinite().all() for param in params)
    other = copy.deepcopy(optimizer)
    other_params = other.param_groups[0]["params"]
    closure()
    for one, copied in zip(params, other_params, strict=True):
        copied.grad = one.grad.clone()
    if name != "LBFGS":
        optimizer.step()
        other.step()
        assert all(map(torch.equal, params, other_params))


# Not finite.


def everything(optimizer, params):
    """What a skipped step must leave alone, but for the counts of steps."""
    state = copy.deepcopy(optimizer.state_dict())
    counts = [state["clipping"].pop(key) for key in ("steps", "skipped_steps")]
    return [param.detach().clone() for param in params], state, counts


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", [NormClip, AutoClip, LinearRandAutoClip, LayerWiseClip, CoordWiseClip])
@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize(
    ("name", "fused"),
    # LBFGS goes on inside one step, with zeros for the gradient that it must not see.
    [(name, False) for name in OPTIMIZERS if name != "LBFGS"] + [(name, True) for name in FUSED],
)
def test_a_skipped_step_touches_nothing(name, fused, path, method, bad, device_path, same):
    # B16
    if path == "device":
        device_path()
    params, closure = problem(name)
    settings = {
        "lr": 0.05,
        **({"fused": True} if fused else {}),
        **({"momentum": 0.9} if name == "SGD" else {}),
    }
    optimizer = clip(OPTIMIZERS[name](params, **settings), method())
    for _ in range(2):
        optimizer.step(closure)
    params_before, state_before, counts = everything(optimizer, params)
    closure()
    grad = params[0].grad
    (grad._values() if grad.is_sparse else grad)[0, 0] = bad
    grads = [param.grad for param in params]
    optimizer.step()
    params_after, state_after, counts_after = everything(optimizer, params)
    assert same(params_after, params_before)
    assert same(state_after, state_before)
    assert counts_after == [counts[0] + 1, 1]
    # The gradients are there again, for whoever wants to look at the NaN.
    assert all(p.grad is not None and p.grad.shape == g.shape for p, g in zip(params, grads, strict=True))
    if not (fused or grad.is_sparse):
        assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    optimizer.step(closure)
    assert not same(params_after, [p.detach() for p in params])
    assert int(optimizer.clipping.telemetry.skipped_steps) == 1


@pytest.mark.parametrize("groups", ["one", "two"])
@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skip_at_the_first_step(fused, path, groups, train, weights, device_path):
    """torch's fused SGD would leave a momentum buffer of uninitialised memory behind."""
    results = []
    for spoilt in (False, True):
        params = weights()
        split = [{"params": params}]
        if groups == "two":
            split = [{"params": params[:1], "momentum": 0.0}, {"params": params[1:], "momentum": 0.9}]
        optimizer = clip(torch.optim.SGD(split, lr=0.1, momentum=0.9, fused=fused), NormClip(1.0))
        if path == "device":
            device_path()
        if spoilt:
            for param in params:
                param.grad = torch.full_like(param, torch.nan)
            optimizer.step()
            for state in optimizer.state.values():
                buffer = state.get("momentum_buffer")
                assert buffer is None or (buffer == 0).all()
        results.append(train(optimizer, params, range(4)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_propagate_lets_it_through(name, path, fused, parameters, device_path):
    if path == "device":
        device_path()
    params = parameters([torch.nan], [1.0])
    optimizer = clip(torch.optim.SGD(params, lr=0.1, fused=fused), CLIPPINGS[name](nonfinite="propagate"))
    optimizer.step()
    assert params[0].isnan().all()
    # As clip_grad_norm_ does: with one norm for all, all of them. adagc begins with that, too.
    whole = optimizer.clipping.by_factor and name != "spike_guard"
    assert params[1].isnan().all() == (whole or name == "adagc")
    assert int(optimizer.clipping.telemetry.skipped_steps) == 0


# Dtypes.


@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_other_dtypes(name, dtype, fused, path, parameters, device_path):
    # B17: a norm of 316 in float16 is no infinity.
    if fused and not torch_steps_fused_in(dtype):
        pytest.skip("this torch's own fused SGD leaves half-precision parameters where they are")
    if path == "device":
        device_path()
    params = parameters([10.0] * 1000, dtype=dtype)
    optimizer = clip(torch.optim.SGD(params, lr=1.0, fused=fused), CLIPPINGS[name]())
    optimizer.step()
    telemetry = optimizer.clipping.telemetry
    assert float(telemetry.grad_norm) == pytest.approx(316.2278, rel=1e-3)
    assert params[0].dtype is dtype
    torch.testing.assert_close(
        params[0].detach().double(),
        torch.full((1000,), 1 - 10 * float(telemetry.clip_coef), dtype=torch.float64),
        rtol=1e-2,
        atol=1e-2,
    )


def torch_steps_fused_in(dtype) -> bool:
    """torch 2.11 on a CPU updates only the last few elements of a long half-precision tensor."""
    param = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    param.grad = torch.ones_like(param)
    torch.optim.SGD([param], lr=1.0, fused=True).step()
    return not param.any()


def test_complex_parameters(parameters):
    params = parameters([3 + 4j, 0j], dtype=torch.complex64)
    optimizer = clip(torch.optim.SGD(params, lr=1.0), NormClip(1.0))
    optimizer.step()
    assert optimizer.clipping.telemetry.grad_norm == 5.0
    torch.testing.assert_close(params[0].detach(), torch.tensor([0.4 - 0.8j, 1 + 0j]))
