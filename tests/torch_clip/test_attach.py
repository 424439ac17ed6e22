"""A clipped optimizer is an optimizer like any other: what users do with one, it survives."""

import copy
import io
import pickle
import subprocess
import sys
from abc import ABC

import pytest
import torch
from torch.optim import lr_scheduler

from torch_clip import CLIPPINGS, ClippedSGD, NonFiniteGradientError, clip
from torch_clip.methods import AutoClip, LayerWiseClip, LinearRandAutoClip, NormClip

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Groups.


def test_one_norm_for_all_groups(parameters):
    # B13: 3 and 4 make 5. Per group each would be cut to 1.
    first, second = parameters([3.0], [4.0])
    optimizer = clip(SGD([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=1.0), NormClip(1.0))
    optimizer.step()
    assert (1 - first).item() == pytest.approx(0.6)
    assert (1 - second).item() == pytest.approx(0.4)


def test_a_group_without_gradients_does_not_count(parameters):
    # B13: a zero in the history would freeze the other group.
    first, second = parameters([2.0], [4.0])
    second.grad = None
    optimizer = clip(SGD([{"params": [first]}, {"params": [second]}], lr=1.0), AutoClip(0.5))
    for _ in range(4):
        first.grad = torch.tensor([2.0])
        optimizer.step()
    assert optimizer.clipping.threshold.history.tolist() == [2.0] * 4
    assert (first.item(), second.item()) == (-7.0, 1.0)


def test_a_group_added_later_is_clipped_with_the_rest(parameters):
    first, second = parameters([3.0], [4.0])
    optimizer = clip(SGD([first], lr=1.0), NormClip(1.0))
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    optimizer.step()
    assert ((1 - first).item(), (1 - second).item()) == pytest.approx((0.6, 0.4))


@pytest.mark.parametrize("key", ["clipping_type", "clipping_level", "p_autoclip", "clipping"])
def test_clipping_settings_in_a_group_are_refused(parameters, key):
    # B15: rather than stored and not honoured.
    params = parameters([1.0], [1.0])
    group = {"params": params[:1], key: "norm"}
    with pytest.raises(ValueError, match=f"group has '{key}'; one clipping serves all groups"):
        clip(SGD([group]), NormClip())
    with pytest.raises(ValueError, match=key):
        ClippedSGD([group])
    optimizer = clip(SGD(params[1:]), NormClip())
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


# Attaching.


def test_a_second_clipping_is_refused(parameters):
    optimizer = clip(SGD(parameters([1.0])), NormClip())
    with pytest.raises(ValueError, match="SGD already has a clipping: NormClip"):
        clip(optimizer, AutoClip())
    with pytest.raises(ValueError, match="ClippedSGD already has a clipping"):
        clip(ClippedSGD(parameters([1.0])), NormClip())
    with pytest.raises(ValueError, match="already"):
        clip(copy.deepcopy(optimizer), NormClip())


def test_what_cannot_be_clipped_is_refused(parameters):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

    with pytest.raises(TypeError, match="Wrapper has no step hooks; if it wraps an optimizer, clip the one"):
        clip(Wrapper(SGD(parameters([1.0]))), NormClip())
    with pytest.raises(TypeError, match="Linear has no step hooks"):
        clip(torch.nn.Linear(1, 1), NormClip())
    for wrong in (NormClip, 1.0, "norm", None):
        with pytest.raises(TypeError, match="clipping must be of torch_clip, such as NormClip"):
            clip(SGD(parameters([1.0])), wrong)


def test_the_optimizer_stays_what_it_was(parameters):
    class Own(SGD):
        pass

    class Abstract(Own, ABC):  # of another object layout, which a swap to a class with a mixin cannot take
        pass

    for cls in (SGD, AdamW, Own, Abstract):
        plain = cls(parameters([1.0]), lr=0.1)
        said = repr(plain)
        clipped = clip(plain, NormClip())
        assert clipped is plain
        assert isinstance(clipped, cls)
        assert repr(clipped) == said
        assert type(clipped).__name__ == cls.__name__
        assert type(clipped) is type(clip(cls(parameters([1.0])), AutoClip()))
        assert type(cls(parameters([1.0]))) is cls  # others of the class are left alone
    alone = parameters([3.0, 4.0])
    SGD(alone, lr=1.0).step()
    assert alone[0].tolist() == [-2.0, -3.0]


# Step.


def by_hand_hook(params):
    def hook(*_):
        torch.nn.utils.clip_grad_norm_(params, 1.0)

    return hook


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


@pytest.mark.parametrize("order", ["scheduler first", "clipping first"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, order, train, weights):
    """The reference clips by hand; a scheduler's wrapper around step must hide the clipping from neither."""
    results = []
    for by_hand in (True, False):
        params = weights()
        optimizer = SGD(params, lr=0.1, momentum=0.9)
        if not by_hand and order == "clipping first":
            clip(optimizer, NormClip(1.0))
        schedule = SCHEDULERS[scheduler](optimizer)
        if not by_hand and order == "scheduler first":
            clip(optimizer, NormClip(1.0))
        if by_hand:
            optimizer.register_step_pre_hook(by_hand_hook(params))
        for step in range(10):
            train(optimizer, params, range(step, step + 1))
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        results.append([*params, torch.tensor(optimizer.param_groups[0]["lr"])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_closures(how, fused, scheduled, weights):
    """Clipped after the closure has made the gradients; the loss comes back; grad mode is the closure's."""
    results, calls = [], []
    for use in (False, True):
        params = weights()
        optimizer = SGD(params, lr=0.1, momentum=0.9, fused=fused)
        if scheduled:
            lr_scheduler.StepLR(optimizer, 100)
        clip(optimizer, NormClip(1.0))
        assert optimizer.step(None) is None
        for step in range(5):

            def closure(optimizer=optimizer, params=params, step=step):
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                loss = sum(((p * (step + 1)) ** 2).sum() for p in params)
                loss.backward()
                return loss

            if not use:
                closure()
                optimizer.step()
            elif how == "positional":
                assert optimizer.step(closure).item() > 0
            else:
                assert optimizer.step(closure=closure).item() > 0
        assert optimizer.clipping.telemetry.steps == 6
        results.append(params)
    assert calls == [True] * 10
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_lbfgs_clips_every_evaluation(weights):
    params = weights()
    optimizer = clip(torch.optim.LBFGS(params, max_iter=4, line_search_fn="strong_wolfe"), NormClip(1.0))
    lengths, evaluations = [], []

    def closure():
        evaluations.append(1)
        optimizer.zero_grad()
        loss = sum((p**4).sum() for p in params)
        loss.backward()
        return loss

    optimizer.register_step_post_hook(
        lambda *_: lengths.append(sum((p.grad**2).sum() for p in params).sqrt().item())
    )
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.clipping.telemetry.steps == len(evaluations) > 3
    assert max(lengths) <= 1 + 1e-5
    optimizer.clipping = AutoClip()
    evaluations.clear()
    optimizer.step(closure)
    assert len(optimizer.clipping.threshold.history) == len(evaluations) > 1


@pytest.mark.parametrize("fused", [False, True])
def test_user_hooks_fire_once(fused, parameters):
    fired = []
    optimizer = SGD(parameters([3.0, 4.0]), lr=0.1, momentum=0.9, fused=fused)
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    clip(optimizer, NormClip(1.0))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert fired == ["pre", "post"] * 2
    assert optimizer.clipping.telemetry.steps == 2
    for _ in range(2):  # hooks are not copied by torch; ours are renewed, once
        optimizer = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        optimizer.step()
    assert fired == ["pre", "post"] * 2
    assert optimizer.clipping.telemetry.steps == 4


@pytest.mark.parametrize("method", [NormClip, LayerWiseClip])
@pytest.mark.parametrize("path", ["host", "device"])
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_exception_inside_step_leaves_nothing_behind(method, path, scheduled, parameters, device_path):
    """Also behind the wrapper of a scheduler: a scaler would multiply its scale with what was left."""
    if path == "device":
        device_path()
    params = parameters([30.0, 40.0])
    optimizer = SGD(params, lr=1.0, fused=True, momentum=0.5)
    if scheduled:
        lr_scheduler.StepLR(optimizer, 100)
    clip(optimizer, method(1.0))

    def fail(*_):
        assert hasattr(optimizer, "grad_scale") == (method is NormClip)
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    attributes = set(vars(optimizer)) | {"_opt_called"}
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    assert set(vars(optimizer)) <= attributes
    assert params[0].tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((params[0] * torch.tensor([0.3, 0.4])).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(params[0].detach(), torch.tensor([0.7, 0.6]))


def test_a_closure_never_sees_what_the_clipping_borrows(parameters):
    """An optimizer may evaluate it again in the same step; gradients hidden from the one are there."""

    class Twice(torch.optim.Optimizer):
        def step(self, closure):
            closure()
            assert params[0].grad is None  # not finite: the optimizer must not see it
            closure()

    params = parameters([torch.nan])
    seen = []
    optimizer = clip(Twice(params, {}), NormClip(1.0))
    optimizer.step(lambda: seen.append(params[0].grad.item()))
    assert len(seen) == 2
    assert params[0].grad.isnan().all()


def test_error_names_the_parameter_in_its_group():
    model = torch.nn.Linear(2, 1)
    for named, said in ((False, "parameter 0 of group 1, shape (1,)"), (True, "group 1 'bias', shape (1,)")):
        groups = [[("weight", model.weight)], [("bias", model.bias)]]
        params = [{"params": g if named else [p for _, p in g]} for g in groups]
        optimizer = clip(SGD(params), NormClip(nonfinite="error"))
        model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([torch.nan])
        before = model.weight.detach().clone()
        with pytest.raises(NonFiniteGradientError) as error:
            optimizer.step()
        assert said in str(error.value)
        assert torch.equal(model.weight, before)
        assert model.weight.grad.tolist() == [[1.0, 1.0]]


# Copies and saved states.


@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_resuming_an_optimizer_repeats_the_run(name, fused, how, train, weights, same):
    # B11: everything the clipping remembers is in state_dict.
    params = weights()
    optimizer = clip(SGD(params, lr=0.1, momentum=0.9, fused=fused), CLIPPINGS[name]())
    train(optimizer, params, range(8))
    if how == "file":
        resumed_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = clip(SGD(resumed_params, lr=0.1, momentum=0.9, fused=fused), CLIPPINGS[name]())
        resumed.load_state_dict(through_file(optimizer.state_dict()))
    else:
        resumed = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        resumed_params = resumed.param_groups[0]["params"]
        assert resumed.clipping is not optimizer.clipping
    wanted = train(optimizer, params, range(8, 16))
    assert same(train(resumed, resumed_params, range(8, 16)), wanted)
    assert same(tuple(resumed.clipping.telemetry), tuple(optimizer.clipping.telemetry))
    assert same(resumed.state_dict(), optimizer.state_dict())
    assert resumed.clipping.telemetry.steps == 16


def test_state_dict_has_one_key_more(parameters):
    optimizer = clip(Adam(parameters([3.0, 4.0])), LinearRandAutoClip())
    optimizer.step()
    state = through_file(optimizer.state_dict())
    assert set(state) == {"state", "param_groups", "clipping"}
    assert state["clipping"]["history"].tolist() == [5.0]
    assert state["clipping"]["steps"] == 1
    assert "clipping" not in state["param_groups"][0]
    Adam(parameters([3.0, 4.0])).load_state_dict(state)  # a plain optimizer passes over it


def test_a_state_without_clipping_starts_fresh(parameters):
    plain = SGD(parameters([3.0]), lr=0.5, momentum=0.9)
    plain.step()
    optimizer = clip(SGD(parameters([3.0]), lr=0.1, momentum=0.9), AutoClip())
    optimizer.step()
    with pytest.warns(UserWarning, match="has no 'clipping': AutoClip starts fresh") as warned:
        optimizer.load_state_dict(plain.state_dict())
    assert warned[0].filename == __file__
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.clipping.state_dict()["steps"] == 0
    assert len(optimizer.clipping.threshold.history) == 0


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"lr": torch.tensor(0.1)}])
def test_the_step_that_only_makes_a_state_is_not_counted(settings, same):
    """Distributed checkpointing takes one when there is no state: with plain SGD at each checkpoint."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = torch.nn.Linear(2, 1)
    optimizer = clip(SGD(model.parameters(), **{"lr": 0.1, **settings}), LinearRandAutoClip())
    before = copy.deepcopy(optimizer.clipping.state_dict())
    for _ in range(2):
        checkpoint.get_optimizer_state_dict(model, optimizer)
    assert same(optimizer.clipping.state_dict(), before)
    assert optimizer.clipping.telemetry is None
    # Of the training are: a warmup that starts at 0, and a gradient that is 0.
    model(torch.ones(2)).sum().backward()
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure=None)
    assert optimizer.clipping.telemetry.steps == 1
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(closure=None)
    optimizer.step()
    assert optimizer.clipping.telemetry.steps == 3


def test_unpickling_in_a_new_process_keeps_the_clipping(tmp_path, parameters):
    """There torch has not yet wrapped the step of the optimizer's class, and hooks would not run."""
    for make in (lambda p: clip(SGD(p, lr=1.0), NormClip(1.0)), lambda p: ClippedSGD(p, lr=1.0)):
        torch.save(make(parameters([3.0, 4.0])), tmp_path / "optimizer.pt")
        program = (
            "import sys, torch\n"
            "optimizer = torch.load(sys.argv[1], weights_only=False)\n"
            "param = optimizer.param_groups[0]['params'][0]\n"
            "param.grad = torch.tensor([3.0, 4.0])\n"
            "optimizer.step()\n"
            "torch.testing.assert_close(param.detach(), torch.tensor([0.4, 0.2]))\n"
            "type(optimizer).__base__([param])\n"  # now torch would wrap it, again
            "optimizer.step()\n"
            "assert optimizer.clipping.telemetry.steps == 2\n"
        )
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "optimizer.pt")], check=True)


def test_averaged_models_are_left_alone(train):
    model = torch.nn.Linear(3, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = clip(SGD(model.parameters(), lr=0.1), NormClip(1.0))
    swa = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    for step in range(4):
        train(optimizer, list(model.parameters()), range(step, step + 1))
        averaged.update_parameters(model)
        swa.step()
    assert optimizer.clipping.telemetry.steps == 4


# torch.compile. The first compilation in a process takes some 20 s.


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_compiled_step_clips(optimizer, fused, train, weights):
    results = []
    for compiled in (False, True):
        params = weights()
        clipped = clip(optimizer(params, lr=0.1, fused=fused), NormClip(0.5))
        if compiled:
            clipped.step = torch.compile(clipped.step)
        results.append(train(clipped, params, range(6)))
        assert clipped.clipping.telemetry.steps == 6
        torch._dynamo.reset()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_calls_its_bases_step_clips_once(closure, fused):
    torch.optim.SGD(
        [torch.nn.Parameter(torch.ones(1))], lr=1.0
    )  # from now on torch hooks the base's step too

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = clip(Own([param], lr=0.1, fused=fused), AutoClip(0.5))
    for k in range(1, 4):
        param.grad = torch.full((3,), float(k))
        optimizer.step(*([lambda: 1.0] if closure else []))
    assert optimizer.clipping.telemetry.steps == 3
    norms = [k * 3**0.5 for k in (1, 2, 3)]
    assert optimizer.clipping.threshold.history.tolist() == pytest.approx(norms)
    param.grad = torch.full((3,), float("nan"))
    optimizer.step()
    assert optimizer.clipping.telemetry.steps == 4
    assert optimizer.clipping.telemetry.skipped_steps == 1


def test_a_method_with_a_scaling_of_its_own_is_not_left_to_the_kernel():
    class Halves(NormClip):
        def scale_(self, grads, measured):
            for grad in grads.tensors:
                grad.mul_(0.5)
            return self.record(measured, 0.5, 1.0)

    for fused in (False, True):
        param = torch.nn.Parameter(torch.zeros(1))
        param.grad = torch.tensor([8.0])
        clip(torch.optim.SGD([param], lr=1.0, fused=fused), Halves()).step()
        assert param.item() == -4.0


def test_a_state_of_another_method_is_refused_before_anything_is_loaded():
    param = torch.nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    saved = clip(torch.optim.SGD([param], lr=0.5, momentum=0.9), NormClip())
    saved.step()
    other = clip(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9), AutoClip())
    with pytest.raises(ValueError, match="the state is of NormClip, this clipping is AutoClip"):
        other.load_state_dict(saved.state_dict())
    assert not other.state
    assert other.param_groups[0]["lr"] == 0.1
