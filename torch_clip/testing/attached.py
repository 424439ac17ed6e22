"""The laws of state, of the optimizer behind a clipping, and of the device below it."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from torch_clip.attach import clip
from torch_clip.testing.expect import (
    Make,
    NotClaimed,
    Run,
    attach,
    expect,
    expect_equal,
    heavy_tailed,
    numbers,
    origin,
    takes,
    through_file,
    train,
)
from torch_clip.thresholds import Percentile


def resume(make: Make) -> None:
    """Through a file, deepcopy and pickle it goes on bit for bit."""
    stream = heavy_tailed(60, seed=4)
    for how in ("a file", "deepcopy", "pickle"):
        run = Run(make(), stream[0])
        for grads in stream[:30]:
            run.step(grads)
        if how == "a file":
            other = Run(make(), stream[0])
            other.clipping.load_state_dict(through_file(run.clipping.state_dict()))
        else:
            other = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))
        for step, grads in enumerate(stream[30:]):
            wanted = run.step(grads)
            expect_equal(other.step(grads), wanted, f"step {step} after resuming through {how}")
        states = other.clipping.state_dict(), run.clipping.state_dict()
        expect_equal(*states, f"the state 30 steps after resuming through {how}")


def optimizer_state(make: Make) -> None:
    """Attached, its state is state_dict()["clipping"], with which the optimizer goes on bit for bit."""
    stream = heavy_tailed(60, seed=6)
    for how in ("a file", "deepcopy", "pickle"):
        optimizer, params = attach(make, stream[0])
        values = train(optimizer, params, stream[:30])
        state = optimizer.state_dict()
        expect("clipping" in state, f"expected state_dict() to have 'clipping', saw {', '.join(state)}")
        expect_equal(state["clipping"], optimizer.clipping.state_dict(), 'state_dict()["clipping"]')
        if how == "a file":
            other, others = attach(make, stream[0])
            with torch.no_grad():
                torch._foreach_copy_(others, values)
            other.load_state_dict(through_file(state))
        else:
            other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
            others = other.param_groups[0]["params"]
        wanted = train(optimizer, params, stream[30:])
        got = train(other, others, stream[30:])
        expect_equal(got, wanted, f"parameters 30 steps after resuming through {how}")
        expect_equal(other.state_dict(), optimizer.state_dict(), f"state resumed through {how}")


def before_momentum(make: Make) -> None:
    """The gradient is clipped before momentum takes it in: a spike is removed, not delayed."""
    stream = heavy_tailed(30, seed=7)
    stream[12] = [1000 * grad for grad in stream[12]]
    optimizer, params = attach(make, stream[0])
    alone = Run(make(), stream[0])
    velocities = [torch.zeros_like(grad) for grad in stream[0]]
    for step, grads in enumerate(stream):
        clipped = alone.step(grads)["gradient"]
        with torch.no_grad():
            for param, velocity, grad in zip(alone.params, velocities, clipped, strict=True):
                param -= 0.1 * velocity.mul_(0.9).add_(grad)
        got = train(optimizer, params, [grads])
        wanted = [param.detach() for param in alone.params]
        expect_equal(
            got, wanted, f"parameters after step {step}, compared with clip_ then momentum", rtol=1e-4
        )
    if alone.clipping.bounded:
        alone.step([1000 * grad for grad in stream[0]])
        zeros = [torch.zeros_like(grad) for grad in stream[0]]
        expect_equal(alone.step(zeros)["gradient"], zeros, "a zero gradient after a spike")


def all_groups(make: Make) -> None:
    """Parameters in several groups, one of them without gradients, are clipped as in one."""
    stream = heavy_tailed(30, seed=8)
    one, params = attach(make, stream[0])
    others = [torch.nn.Parameter(torch.ones_like(grad)) for grad in stream[0]]
    groups = [{"params": [param]} for param in (*others, torch.nn.Parameter(torch.ones(3)))]
    several = clip(SGD(groups, lr=0.1, momentum=0.9), make())
    for step, grads in enumerate(stream):
        wanted, got = train(one, params, [grads]), train(several, others, [grads])
        what = f"after step {step}, in {len(groups)} groups compared with one"
        expect_equal(got, wanted, f"parameters {what}", rtol=1e-4)
        said = [numbers(optimizer.clipping.telemetry) for optimizer in (several, one)]
        expect_equal(*said, f"telemetry {what}", rtol=1e-4)


def foreach_and_fused(make: Make) -> None:
    """The optimizer's loop, foreach and fused forms clip alike, a zero gradient too."""
    stream = heavy_tailed(30, seed=9)
    stream.append([torch.zeros_like(grad) for grad in stream[0]])
    loop, params = attach(make, stream[0], foreach=False)
    others = {form: attach(make, stream[0], **{form: True}) for form in ("foreach", "fused")}
    for step, grads in enumerate(stream):
        wanted = train(loop, params, [grads])
        for form, (optimizer, its) in others.items():
            what = f"after step {step}, {form}=True compared with a loop"
            expect_equal(train(optimizer, its, [grads]), wanted, f"parameters {what}", rtol=1e-4)
            said = [numbers(one.clipping.telemetry) for one in (optimizer, loop)]
            expect_equal(*said, f"telemetry {what}", rtol=1e-4)


def grad_scaler(make: Make) -> None:
    """Under a GradScaler, fused or not, norms and thresholds are those of the unscaled gradient."""
    stream = heavy_tailed(30, seed=10)
    for fused in (False, True):
        plain, params = attach(make, stream[0], fused=fused)
        scaled, its = attach(make, stream[0], fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step, grads in enumerate(stream):
            wanted = train(plain, params, [grads])
            scaled.zero_grad()
            loss = sum((param * grad).sum() for param, grad in zip(its, grads, strict=True))
            scaler.scale(loss).backward()
            scaler.step(scaled)
            scaler.update()
            what = f"after step {step}, scaled by 1024 compared with unscaled, fused={fused}"
            expect_equal([param.detach() for param in its], wanted, f"parameters {what}", rtol=1e-4)
            said = [numbers(one.clipping.telemetry) for one in (scaled, plain)]
            expect_equal(*said, f"telemetry {what}", rtol=1e-4)


def infinite_threshold(make: Make) -> None:
    """With threshold=inf (percentile=1 for a percentile of norms) it is the bare optimizer bit for bit."""
    settings = {"threshold": math.inf} if takes(make, "threshold") else {}
    if isinstance(getattr(make(), "threshold", None), Percentile) and takes(make, "percentile"):
        settings = {"percentile": 1.0}
    never = functools.partial(make, **settings)
    stream = heavy_tailed(20, seed=10)
    for kind in (SGD, AdamW):
        for fused in (False, True):
            bare, clipped = (attach(one, stream[0], kind, fused=fused) for one in (None, never))
            wanted, got = train(*bare, stream), train(*clipped, stream)
            steps = int(clipped[0].clipping.telemetry.clipped_steps)
            if steps and not settings:
                raise NotClaimed("it has no setting 'threshold' to say that nothing is to be clipped")
            expect(not steps, f"expected no step to be clipped with {settings}, saw {steps}")
            state = {k: v for k, v in clipped[0].state_dict().items() if k != "clipping"}
            what = f"of {kind.__name__}(fused={fused}) with {settings}, compared with the bare optimizer"
            expect_equal(got, wanted, f"parameters {what}")
            expect_equal(state, bare[0].state_dict(), f"state {what}")


class _Transfers(TorchDispatchMode):
    """Refuses copies to the host that wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and not (kwargs or {}).get("non_blocking"):
            waits = args[0].device.type != "cpu" and result.device.type == "cpu"
            expect(not waits, "copied to the host")
        return result


def no_host_read(make: Make) -> None:
    """On a device nothing is read by the host, alone and with a fused optimizer; found without a device."""
    from torch._subclasses import fake_tensor

    if getattr(make(), "nonfinite", "skip") == "error":
        raise NotClaimed("nonfinite='error' must read whether to raise")
    like = heavy_tailed(1)[0]
    with fake_tensor.FakeTensorMode(), _Transfers():
        params = [torch.nn.Parameter(torch.ones(grad.shape, device="cuda")) for grad in like]
        clipping, optimizer = make(), clip(AdamW(params, fused=True), make())
        try:
            for _ in range(3):
                for act in (lambda: clipping.clip_(params), optimizer.step):
                    for param in params:
                        param.grad = torch.ones_like(param)
                    act()
        except (
            AssertionError,
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
        ) as error:
            reason = f"expected no host read of a CUDA tensor, saw one at {origin(error)} ({error})"
            raise AssertionError(reason) from error
        for said in (clipping.telemetry, optimizer.clipping.telemetry):
            kept = isinstance(said.grad_norm, Tensor) and said.grad_norm.device.type == "cuda"
            expect(kept, f"expected grad_norm on the device, saw {said.grad_norm}")
