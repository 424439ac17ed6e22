"""Optimizers that are not torch's: the classes of pytorch-optimizer, and wrappers around an optimizer."""

import copy
import pickle

import pytest
import torch

from torch_clip import clip
from torch_clip.methods import AutoClip, NormClip

# Of every kind that the package has: sign, adaptive, projected, factored, second-order, low-rank, free of lr
# or of schedule, with noise, and with a clipping of their own.
# fmt: off
CLASSES = [
    "A2Grad", "AdaBelief", "AdaBound", "AdaFactor", "AdamP", "AdamW", "AdEMAMix", "Adai", "Adan", "ADOPT",
    "AggMo", "CAME", "DAdaptAdam", "DiffGrad", "FTRL", "Fromage", "GaLore", "Gravity", "Kron", "LARS",
    "Lamb", "Lion", "MADGRAD", "MARS", "Nero", "NovoGrad", "PNM", "Prodigy", "QHM", "RAdam", "Ranger",
    "SGDP", "SGDW", "SM3", "SOAP", "SRMM", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD",
    "Shampoo", "SignSGD", "SPAM", "StableAdamW", "Tiger", "VSGD", "Yogi",
]
# fmt: on
WRAPPERS = ["Lookahead", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper", "TRAC"]


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("pytorch_optimizer")


def parameters():
    rng = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((4, 3), (5, 6), (7,))]


def by_hand(optimizer, params):
    def hook(*_):
        torch.nn.utils.clip_grad_norm_(params, 1.0)

    optimizer.register_step_pre_hook(hook)
    return optimizer


def train(optimizer, params, steps):
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=rng) * (30 if step % 3 == 2 else 0.1)
        torch.manual_seed(step)  # some draw noise
        optimizer.step()
    return [param.detach().clone() for param in params]


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_clip_grad_norm_and_itself(package, name):
    cls = getattr(package, name)
    plain, params = parameters(), parameters()
    reference = by_hand(cls(plain), plain)
    optimizer = clip(cls(params), NormClip(1.0))
    assert isinstance(optimizer, cls)
    assert repr(optimizer) == repr(reference)
    torch.testing.assert_close(
        train(optimizer, params, range(9)), train(reference, plain, range(9)), rtol=1e-3, atol=1e-5
    )
    telemetry = optimizer.clipping.telemetry
    assert (telemetry.steps, telemetry.clipped_steps) == (9, 3)


def outcome(work):
    """What ``work`` returns, or the kind of its error."""
    try:
        return work()
    except Exception as error:
        return type(error)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda it: pickle.loads(pickle.dumps(it))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_goes_on_as_the_original(package, name, how):
    """Where the class itself can be copied: torch drops attributes, and some of these classes need theirs."""
    cls = getattr(package, name)

    def train_a_copy(of):
        copied = COPIES[how](of)
        return copied, train(copied, copied.param_groups[0]["params"], range(4, 8))

    params = parameters()
    stock = cls(params)
    train(stock, params, range(4))
    wanted = outcome(lambda: train_a_copy(stock))

    params = parameters()
    optimizer = clip(cls(params), AutoClip(0.5))
    train(optimizer, params, range(4))
    got = outcome(lambda: train_a_copy(optimizer))
    if isinstance(wanted, type):
        assert got is wanted
        return
    copied, copied_params = got
    assert copied.clipping is not optimizer.clipping
    assert copied.clipping.telemetry.steps == 8
    assert len(copied.clipping.threshold.history) == 8
    assert optimizer.clipping.telemetry.steps == 4
    assert all(map(torch.equal, copied_params, train(optimizer, params, range(4, 8))))


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_carries_the_clipping(package, name):
    cls = getattr(package, name)
    params = parameters()
    optimizer = clip(cls(params), AutoClip(0.5))
    train(optimizer, params, range(5))
    state = copy.deepcopy(optimizer.state_dict())
    other_params = parameters()
    other = clip(cls(other_params), AutoClip(0.5))
    train(other, other_params, range(1))  # some make their state at the first step
    other.load_state_dict(state)
    assert other.clipping.state_dict()["steps"] == 5
    assert torch.equal(other.clipping.threshold.history, optimizer.clipping.threshold.history)
    train(other, other_params, range(5, 6))
    assert other.clipping.telemetry.steps == 6


# Wrappers. One with step hooks is clipped before its own work; one without cannot be, and says what can.


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_with_hooks(package, name):
    def make(params):
        return getattr(package, name)(torch.optim.SGD(params, lr=0.1, momentum=0.9))

    plain, params = parameters(), parameters()
    reference, optimizer = by_hand(make(plain), plain), clip(make(params), NormClip(1.0))
    torch.testing.assert_close(
        train(optimizer, params, range(9)), train(reference, plain, range(9)), rtol=1e-4, atol=1e-5
    )
    assert optimizer.clipping.telemetry.clipped_steps == 3
    other = clip(make(parameters()), NormClip(1.0))
    other.load_state_dict(optimizer.state_dict())
    assert other.clipping.state_dict()["clipped_steps"] == 3


def test_sam_clips_the_gradient_that_it_steps_with(package):
    """The gradient before the step gives a direction only; those of the closure are clipped."""
    results = []
    for clipped in (False, True):
        params = parameters()
        optimizer = package.SAM(params, torch.optim.SGD, lr=0.1)
        if clipped:
            clip(optimizer, NormClip(1.0))

        def closure(params=params, clipped=clipped):
            for param in params:
                param.grad = None
            loss = sum((param**4).sum() for param in params)
            loss.backward()
            if not clipped:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            return loss

        for _ in range(4):
            closure()
            optimizer.step(closure)
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results)
    assert optimizer.clipping.telemetry.clipped_steps == 4


def test_a_wrapper_without_hooks_is_refused_with_the_way_on(package):
    class OldLookahead(torch.optim.Optimizer):
        """As Lookahead was in earlier releases, and is in other packages."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

    class Lookahead4(OldLookahead):
        """As it was in release 4.0: torch cannot register a hook in a plain dictionary."""

        def __init__(self, optimizer):
            super().__init__(optimizer)
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    inner = torch.optim.SGD(parameters())
    for cls in (OldLookahead, Lookahead4, package.SafeFP16Optimizer):
        wrapper = cls(inner)
        with pytest.raises(
            TypeError, match="has no step hooks; if it wraps an optimizer, clip the one inside"
        ):
            clip(wrapper, NormClip())
        assert type(wrapper) is cls  # not left half attached
        assert not hasattr(wrapper, "clipping")
    assert clip(inner, NormClip()) is inner


def test_the_wrapper_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    plain, params = parameters(), parameters()
    prepared = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer has no step hooks; .* clip the one inside"):
        clip(prepared, NormClip(1.0))
    clip(prepared.optimizer, NormClip(1.0))
    reference = by_hand(torch.optim.SGD(plain, lr=0.1, momentum=0.9), plain)
    torch.testing.assert_close(train(prepared, params, range(6)), train(reference, plain, range(6)))
    assert prepared.optimizer.clipping.telemetry.clipped_steps == 2
