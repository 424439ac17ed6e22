"""The laws of what a clipping does to gradients, and says of it."""

from __future__ import annotations

import copy
import functools
import math
import random

import torch
from torch.optim import SGD, AdamW

from torch_clip.clipping import NONFINITE, Clipping, NonFiniteGradientError
from torch_clip.shapes import hard, normalized
from torch_clip.testing.expect import (
    COUNTS,
    Grads,
    Make,
    NotClaimed,
    Run,
    assign,
    attach,
    expect,
    expect_equal,
    heavy_tailed,
    norm_of,
    numbers,
    takes,
    train,
)

# A method that clips nothing says so by an infinite threshold. Any other must have clipped something by the
# time that gradients are as long as this; float32 norms overflow at 1e19.
LONGEST = 1e15


def zero_gradient(make: Make) -> None:
    """A zero gradient stays zero, and says nothing about the scale of the next."""
    if make().carries:
        raise NotClaimed("carries is True: what was left of others is added")
    stream = heavy_tailed(4)
    run, twin = Run(make(), stream[0]), Run(make(), stream[0])
    for _ in range(3):
        zeros = [torch.zeros_like(grad) for grad in stream[0]]
        got = run.step(zeros)
        wanted = {**got, "gradient": zeros, "grad_norm": 0.0, "clip_coef": 1.0, "clipped": 0.0}
        expect_equal(got, wanted, "a zero gradient")
        twin.step([None] * len(zeros))
    for grads in stream:
        wanted = twin.step(grads)
        expect_equal(run.step(grads), wanted, "after three zero gradients, compared with after none")


def no_gradients(make: Make) -> None:
    """A step without gradients is counted, and changes nothing else."""
    stream = heavy_tailed(3)
    run = Run(make(), stream[0])
    steps = [run.step(grads) for grads in stream][-1]["steps"]
    before = run.remembered()
    for params in ([], [torch.nn.Parameter(torch.ones(2))], iter(())):
        got = numbers(run.clipping.clip_(params))
        steps += 1
        wanted = {**got, "grad_norm": 0.0, "clip_coef": 1.0, "clipped": 0.0, "steps": steps}
        expect_equal(got, wanted, "a step without gradients")
    expect_equal(run.remembered(), before, "the state after steps without gradients")
    got = Run(make(), [torch.ones(0)]).step([torch.ones(0)])["grad_norm"]
    expect(got == 0.0, f"the norm of a gradient without elements: expected 0, saw {got}")


def huge_gradient(make: Make) -> None:
    """A gradient as long as 5e18 comes out finite and measured, in float32, float64 and bfloat16."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        grads = [torch.tensor([3.0, 0.0], dtype=dtype), torch.tensor([-4.0], dtype=dtype)]
        run = Run(make(), grads)
        for scale in (1.0, 1e17, 1e18):
            got = run.step([grad * scale for grad in grads])
            what = f"a gradient of norm {5 * scale:g} in {dtype}"
            bad = [float(x) for grad in got["gradient"] for x in grad.flatten() if not x.isfinite()]
            expect(not bad, f"{what}: expected finite gradients, saw {bad}")
            expect_equal(got["grad_norm"], 5 * scale, f"{what}: grad_norm", rtol=1e-2)


def half_precision(make: Make) -> None:
    """float16 and bfloat16 gradients keep their dtype and are clipped as float32 ones: norms are float32."""
    # Added up in float16 the first overflows; in bfloat16 the second stops growing at 16.
    for dtype, count, values in (
        (torch.float16, 100_000, (3, 30, 300)),
        (torch.bfloat16, 2000, (0.01, 0.1, 1)),
    ):
        whole = torch.ones(count)
        run, twin = Run(make(), [whole.to(dtype)]), Run(make(), [whole])
        for value in values:
            got, wanted = run.step([whole.to(dtype) * value]), twin.step([whole * value])
            what = f"{count} elements of {value} in {dtype}"
            expect_equal(got["grad_norm"], wanted["grad_norm"], f"{what}: grad_norm", rtol=1e-2)
            after = [grad.float() for grad in got["gradient"]]
            expect_equal(after, wanted["gradient"], f"{what}, compared with float32", rtol=1e-2)
            expect(got["gradient"][0].dtype is dtype, f"{what}: saw {got['gradient'][0].dtype} afterwards")


def not_finite(make: Make) -> None:
    """NaN, Inf and overflow go as `nonfinite` says: a skip touches nothing, and no history keeps them."""
    policies = NONFINITE if takes(make, "nonfinite") else [getattr(make(), "nonfinite", "skip")]
    for policy in policies:
        made = functools.partial(make, nonfinite=policy) if takes(make, "nonfinite") else make
        for bad in (math.nan, math.inf, 1.5e19):
            *stream, spoilt = heavy_tailed(4)
            spoilt = [torch.full_like(grad, bad) if bad == 1.5e19 else grad for grad in spoilt]
            spoilt[1][0] = bad
            what = f"{'a norm that overflows' if bad == 1.5e19 else bad} under nonfinite={policy!r}"
            run, twin = Run(made(), spoilt), Run(made(), spoilt)
            for grads in stream:
                run.step(grads)
                twin.step(grads)
            before = run.remembered()
            if policy == "error":
                _raises(run, spoilt, what)
            else:
                twin.step([None] * len(spoilt))
                got = run.step(spoilt)
                expect(not math.isfinite(got["grad_norm"]), f"{what}: saw grad_norm {got['grad_norm']}")
                expect_equal(got["skipped_steps"], float(policy == "skip"), f"{what}: skipped_steps")
                if policy == "skip":
                    wanted = {**got, "clip_coef": 1.0, "clipped": 0.0}
                    expect_equal(got, wanted, f"{what}: telemetry")
                    left = [torch.zeros_like(grad) for grad in spoilt]
                    expect_equal(got["gradient"], left, f"{what}: the gradient left to an optimizer")
                    _skips(made, stream, spoilt, what)
            expect_equal(run.remembered(), before, f"{what}: the state, compared with before")
            for later, grads in enumerate(heavy_tailed(20, seed=12)):
                wanted = twin.step(grads)
                got = {**run.step(grads), "skipped_steps": wanted["skipped_steps"]}
                if policy == "propagate":  # how much of it is clipped, a bad step need not know
                    got["clipped_steps"] = wanted["clipped_steps"]
                same = f"step {later} after {what}, compared with after a step without gradients"
                expect_equal(got, wanted, same)


def _raises(run: Run, spoilt: Grads, what: str) -> None:
    try:
        run.step(spoilt)
    except NonFiniteGradientError:
        left = [param.grad for param in run.params]
        expect_equal(left, spoilt, f"{what}: the gradient, compared with before")
    else:
        raise AssertionError(f"{what}: expected NonFiniteGradientError, saw a step")


def _skips(make: Make, stream: list[Grads], spoilt: Grads, what: str) -> None:
    for kind, fused in ((SGD, False), (AdamW, True)):
        optimizer, params = attach(make, spoilt, kind, fused=fused)
        before = train(optimizer, params, stream), copy.deepcopy(optimizer.state_dict()["state"])
        after = train(optimizer, params, [spoilt]), optimizer.state_dict()["state"]
        for part, got, wanted in zip(("parameters", "state"), after, before, strict=True):
            expect_equal(got, wanted, f"{what}: {part} of {kind.__name__}, compared with before the step")


def clips(make: Make) -> None:
    """Gradients long enough are clipped; a method that never clips says so by a threshold of inf."""
    run = Run(make(), heavy_tailed(1)[0])
    norms, thresholds, changed, said = [], [], 0, {}
    for power in range(0, int(math.log10(LONGEST)), 2):
        for grads in heavy_tailed(30, seed=power):
            before = [grad * 10.0**power for grad in grads]
            said = run.step(before)
            changed += not all(map(torch.equal, said["gradient"], before))
            norms.append(norm_of(before))
            thresholds.append(said["threshold"])
        if changed and min(thresholds) < math.inf:
            return
    silent = set(thresholds) == {math.inf}
    if silent and not changed:
        raise NotClaimed("its threshold is always inf: it clips nothing")
    expect(not silent, f"an infinite threshold says that nothing is clipped, saw {changed} gradients changed")
    raise AssertionError(
        f"expected some of {len(norms)} gradients of norm {min(norms):.3g} to {max(norms):.3g} to be clipped "
        f"at thresholds from {min(thresholds):.3g} to {max(thresholds):.3g}, saw none changed "
        f"(telemetry says clipped_steps={said['clipped_steps']:g})",
    )


def in_place(make: Make) -> None:
    """`.grad` is changed where it lies, and the parameters are not changed."""
    stream = heavy_tailed(12)
    run = Run(make(), stream[0])
    for grads in stream:
        assign(run.params, grads)
        tensors = [param.grad for param in run.params]
        run.clipping.clip_(run.params)
        moved = sum(param.grad is not grad for param, grad in zip(run.params, tensors, strict=True))
        expect(not moved, f"expected each .grad to be the same tensor as before, saw {moved} others")
    ones = [torch.ones_like(grad) for grad in stream[0]]
    expect_equal([param.detach() for param in run.params], ones, "the parameters after clip_")


def bounded(make: Make) -> None:
    """Where it declares `bounded`: no gradient gets longer, and where nothing is clipped nothing changes."""
    if not make().bounded:
        raise NotClaimed("bounded is False")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        stream = heavy_tailed(30, seed=1, dtype=dtype)
        run = Run(make(), stream[0])
        for step, before in enumerate(stream):
            got = run.step(before)
            after, what = got["gradient"], f"step {step}, {dtype}"
            long, was = norm_of(after), norm_of(before)
            expect(long <= was * (1 + 1e-6), f"{what}: expected a norm of at most {was:.9g}, saw {long:.9g}")
            expect(
                0 <= got["clip_coef"] <= 1, f"{what}: expected clip_coef in [0, 1], saw {got['clip_coef']}"
            )
            if got["clipped"] == 0:
                expect_equal(after, before, f"{what}: the gradient, of which nothing is said to be clipped")
            if isinstance(run.clipping, Clipping):  # which only scales, each element by a factor in [0, 1]
                fair = [(n.abs() <= o.abs()) & (n * o >= 0) for n, o in zip(after, before, strict=True)]
                bad = sum(int((~ok).sum()) for ok in fair)
                expect(not bad, f"{what}: expected factors in [0, 1], saw {bad} elements outside")


def telemetry(make: Make) -> None:
    """Norm, coefficient, share and counts are what is measured from outside, and stay as published."""
    stream = heavy_tailed(36, seed=5)
    run = Run(make(), stream[0])
    published, clipped_steps = [], 0
    for step, before in enumerate(stream):
        got = run.step(before)
        norm, after, what = norm_of(before), got["gradient"], f"step {step}"
        expect_equal(got["grad_norm"], norm, f"{what}: grad_norm", rtol=1e-4)
        expect_equal(got["clip_coef"], norm_of(after) / norm, f"{what}: clip_coef", rtol=1e-4)
        share = got["clipped"]
        expect(0 <= share <= 1, f"{what}: expected clipped in [0, 1], saw {share}")
        changed = torch.cat([(n != o).flatten() for n, o in zip(after, before, strict=True)])
        tensors = [not torch.equal(n, o) for n, o in zip(after, before, strict=True)]
        seen = {
            "steps": float(changed.any()),
            "tensors": sum(tensors) / len(tensors),
            "elements": float(changed.double().mean()),
        }
        if not run.clipping.bounded:
            pass  # what lengthens a gradient does not clip it
        elif isinstance(run.clipping, Clipping) and run.clipping.unit in seen:
            expect_equal(share, seen[run.clipping.unit], f"{what}: share of {run.clipping.unit}", rtol=1e-4)
        else:
            expect((share > 0) == changed.any(), f"{what}: saw clipped {share}, {int(changed.sum())} changes")
        cut = getattr(run.clipping, "shape", None) in (hard, normalized)
        if cut and run.clipping.unit == "steps" and share:
            ratio = got["threshold"] / norm
            expect_equal(got["clip_coef"], ratio, f"{what}: clip_coef by threshold / grad_norm", rtol=1e-4)
        clipped_steps += share > 0
        for name, count in zip(COUNTS, (step + 1, clipped_steps, 0), strict=True):
            expect(got[name] == count, f"{what}: expected {name} {count}, saw {got[name]:g}")
        published.append((run.clipping.telemetry, {k: v for k, v in got.items() if k != "gradient"}))
    for step, (kept, said) in enumerate(published):
        expect_equal(numbers(kept), said, f"clipping.telemetry kept from step {step}")


def one_norm(make: Make) -> None:
    """A gradient in several tensors is clipped as in one, unless it says `by_tensor`."""
    if make().by_tensor:
        raise NotClaimed("by_tensor is True")
    stream = heavy_tailed(60, seed=2)
    whole = [[torch.cat([grad.flatten() for grad in grads])] for grads in stream]
    one, other = Run(make(), whole[0]), Run(make(), stream[0])
    for step, (joined, split) in enumerate(zip(whole, stream, strict=True)):
        wanted, got = one.step(joined), other.step(split)
        got["gradient"] = [torch.cat([grad.flatten() for grad in got["gradient"]])]
        expect_equal(got, wanted, f"step {step} in {len(split)} tensors, compared with one", rtol=1e-4)


def own_draws(make: Make) -> None:
    """Random draws are its own, one a step however many tensors; the global generators are not touched."""
    stream = heavy_tailed(60, seed=3)
    none, spare = [None] * 5, [torch.zeros(4)] * 5
    plain, crowded = (Run(make(), spare + stream[0]) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        for step, grads in enumerate(stream):
            torch.manual_seed(step)
            states = torch.get_rng_state(), random.getstate()
            wanted = plain.step([*none, *grads])
            untouched = torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
            expect(untouched, f"step {step}: expected no draw from a global generator, saw one advance")
            torch.manual_seed(-1 - step)
            got = crowded.step([*(spare if step % 2 else none), *grads])
            got |= {
                name: wanted[name] for name in ("clipped", "threshold")
            }  # share and median of more tensors
            what = f"step {step}, five zero gradients more in every other step, compared with none"
            expect_equal(got, wanted, what, rtol=1e-4)
