"""The host never waits for a device: by fake CUDA tensors, by counting reads, and on CUDA itself."""

import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_clip import CLIPPINGS, NonFiniteGradientError, clip

FUSED = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]
SEQUENCE = [0.5, 3.0, torch.nan, 1.0, 0.0, 40.0, torch.inf, 7.0, 0.2, 2.0]


def step_grads(length, dtype=torch.float32):
    """Three gradients of a step; ``length`` scales them, or spoils one of them."""
    rng = torch.Generator().manual_seed(7)
    grads = [torch.randn(shape, generator=rng, dtype=dtype) for shape in ((4, 3), (5,), (150, 120))]
    finite = length if abs(length) < torch.inf else 1.0
    grads = [grad * finite for grad in grads]
    if finite is not length:
        grads[1][2] = length
    return grads


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(("aten._local_scalar_dense", "aten.nonzero"))
        return func(*args, **(kwargs or {}))


def steps_with(optimizer, params, lengths):
    """One step for each length; telemetry and parameters after each of them."""
    for length in lengths:
        for param, grad in zip(params, step_grads(length), strict=True):
            param.grad = grad
        optimizer.step()
        yield optimizer.clipping.telemetry, [p.detach().clone() for p in params]


def make(name, optimizer, nonfinite="skip", **settings):
    params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in step_grads(1.0)]
    return clip(optimizer(params, lr=0.1, **settings), CLIPPINGS[name](nonfinite=nonfinite)), params


# Fake CUDA tensors: any read on the host raises.


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_clip_alone_on_fake_cuda(name, nonfinite):
    # B10
    clipping = CLIPPINGS[name](nonfinite=nonfinite)
    with FakeTensorMode():
        params = [
            torch.nn.Parameter(torch.ones(shape, device="cuda")) for shape in ((4, 3), (7,), (200, 200))
        ]
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            telemetry = clipping.clip_(params)
            for value in (telemetry.grad_norm, telemetry.clip_coef, telemetry.clipped, telemetry.steps):
                assert value.device.type == "cuda"
                assert value.shape == ()


def test_a_host_read_is_found():
    """The check above can fail: nonfinite="error" must read, as it says."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3, device="cuda"))
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError) as error:
            CLIPPINGS["norm"](nonfinite="error").clip_([param])
        assert "DataDependentOutput" in type(error.value).__name__


def fused_on_cuda(optimizer, params, **settings):
    probe = optimizer([torch.nn.Parameter(torch.zeros_like(params[0]))], lr=0.1, fused=True)
    probe.param_groups[0]["params"][0].grad = torch.zeros_like(params[0])
    try:
        probe.step()
    except RuntimeError as error:  # Adagrad in torch 2.11
        pytest.skip(f"this torch: {error}")
    return optimizer(params, lr=0.1, fused=True, **settings)


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("name", CLIPPINGS)
def test_a_fused_optimizer_on_fake_cuda(name, optimizer, monkeypatch):
    # B10: with the coefficient in grad_scale and the skip in found_inf nothing has to be read.
    for kernel in ("_fused_sgd_", "_fused_adagrad_"):
        monkeypatch.setattr(torch, kernel, lambda *args, **kwargs: None)  # have no fake of their own
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    with FakeTensorMode():
        # B23: on two devices.
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cuda:0", "cuda:1")]
        clipped = clip(fused_on_cuda(optimizer, params, **settings), CLIPPINGS[name]())
        for step in range(4):
            for param in params:
                param.grad = torch.ones_like(param)
            if step == 2:  # as a GradScaler does
                clipped.grad_scale = torch.full((), 2.0, device="cuda")
                clipped.found_inf = torch.zeros((), device="cuda")
            clipped.step()
        assert clipped.clipping.telemetry.steps.device.type == "cuda"


@pytest.mark.parametrize("name", CLIPPINGS)
def test_an_unfused_optimizer_on_fake_cuda(name):
    """``propagate`` reads nothing; ``skip`` reads one flag, as its note says, and so does a guard."""
    for nonfinite in ("propagate", "skip"):
        with FakeTensorMode():
            params = [torch.nn.Parameter(torch.ones(3, device="cuda"))]
            optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)
            clip(optimizer, CLIPPINGS[name](nonfinite=nonfinite))
            params[0].grad = torch.ones_like(params[0])
            if nonfinite == "propagate" and name != "spike_guard":
                optimizer.step()
            else:
                with pytest.raises(RuntimeError):
                    optimizer.step()


@pytest.mark.parametrize("name", CLIPPINGS)
def test_several_devices_on_fake_cuda(name):
    # B23: gradients on two devices have one norm, and each is scaled where it is.
    clipping = CLIPPINGS[name]()
    with FakeTensorMode():
        devices = ["cuda:0", "cuda:1", "cuda:0"]
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in devices]
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            telemetry = clipping.clip_(params)
        assert [str(param.grad.device) for param in params] == devices
        assert str(telemetry.grad_norm.device) == "cuda:0"


# The same path on the CPU, where the numbers can be compared.


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_clip_alone_is_equal_on_both_paths(name, nonfinite, parameters, device_path):
    wanted = []
    for path in ("host", "device"):
        if path == "device":
            device_path()
        clipping = CLIPPINGS[name](nonfinite=nonfinite)
        for k, length in enumerate(SEQUENCE):
            params = parameters(*step_grads(length))
            with HostReads() as reads:
                telemetry = clipping.clip_(params)
            # Alone, a skip on a device leaves zeros where the host removes the gradients.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            said = torch.tensor([float(value) for value in telemetry])
            if path == "host":
                wanted.append((grads, said))
                continue
            assert reads.count == 0
            torch.testing.assert_close((grads, said), wanted[k], equal_nan=True)


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("name", CLIPPINGS)
def test_a_fused_optimizer_is_equal_on_both_paths(name, optimizer, device_path):
    settings = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    one, one_params = make(name, optimizer, fused=True, **settings)
    wanted = list(steps_with(one, one_params, SEQUENCE))
    device_path()
    other, other_params = make(name, optimizer, fused=True, **settings)
    with HostReads() as reads:
        got = list(steps_with(other, other_params, SEQUENCE))
    assert reads.count == 0
    for (said, params), (wanted_said, wanted_params) in zip(got, wanted, strict=True):
        torch.testing.assert_close(params, wanted_params, rtol=1e-4, atol=1e-5)
        numbers = [torch.tensor([float(value) for value in t]) for t in (said, wanted_said)]
        torch.testing.assert_close(*numbers, equal_nan=True)
    assert int(got[-1][0].skipped_steps) == 2
    state = other.state_dict()["state"]
    torch.testing.assert_close(state, one.state_dict()["state"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLIPPINGS)
def test_an_unfused_optimizer_reads_one_flag(name, device_path):
    one, one_params = make(name, torch.optim.SGD, momentum=0.9)
    wanted = list(steps_with(one, one_params, SEQUENCE))
    device_path()
    other, other_params = make(name, torch.optim.SGD, momentum=0.9)
    with HostReads() as reads:
        got = list(steps_with(other, other_params, SEQUENCE))
    assert reads.count == len(SEQUENCE)
    for (_, params), (_, wanted_params) in zip(got, wanted, strict=True):
        torch.testing.assert_close(params, wanted_params)


@pytest.mark.parametrize("after", [2, 3, 7])
@pytest.mark.parametrize("name", CLIPPINGS)
def test_resuming_on_a_device(name, after, device_path, same):
    """Bit for bit through a file, also right before and after a skipped step."""
    device_path()
    one, one_params = make(name, torch.optim.SGD, fused=True, momentum=0.9)
    list(steps_with(one, one_params, SEQUENCE[:after]))
    file = io.BytesIO()
    torch.save((one.state_dict(), [p.detach() for p in one_params]), file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    other, other_params = make(name, torch.optim.SGD, fused=True, momentum=0.9)
    with torch.no_grad():
        for param, value in zip(other_params, values, strict=True):
            param.copy_(value)
    other.load_state_dict(state)
    wanted = list(steps_with(one, one_params, SEQUENCE[after:]))
    got = list(steps_with(other, other_params, SEQUENCE[after:]))
    for (said, params), (wanted_said, wanted_params) in zip(got, wanted, strict=True):
        assert same(params, wanted_params)
        assert same(tuple(said), tuple(wanted_said))
    assert same(other.state_dict(), one.state_dict())


@pytest.mark.parametrize("name", CLIPPINGS)
def test_fused_costs_one_read_of_the_gradients(name, device_path):
    """A global coefficient travels in grad_scale: no multiplication of the gradients is ours."""

    class Written(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += "_foreach_mul_" in str(func) or "mul_." in str(func) or "clamp_" in str(func)
            return func(*args, **(kwargs or {}))

    for path in ("host", "device"):
        if path == "device":
            device_path()
        optimizer, params = make(name, torch.optim.SGD, fused=True)
        with Written() as written:
            list(steps_with(optimizer, params, [40.0] * 3))
        if optimizer.clipping.by_factor:
            assert written.count == 0
        elif name in ("layer_wise", "coordinate_wise"):
            assert written.count


# CUDA: the same, where waiting is an error.

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def sync_is_an_error():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("name", CLIPPINGS)
def test_clip_alone_on_cuda(name, parameters, sync_is_an_error):
    here, there = CLIPPINGS[name](), CLIPPINGS[name]()
    there.clip_([parameter.cuda() for parameter in parameters([1.0])])  # nothing to clip; wakes the device
    for length in SEQUENCE:
        params = parameters(*step_grads(length))
        on_cuda = [torch.nn.Parameter(param.detach().cuda()) for param in params]
        for moved, param in zip(on_cuda, params, strict=True):
            moved.grad = param.grad.cuda()
        torch.cuda.synchronize()
        sync_is_an_error()
        said = there.clip_(on_cuda)
        torch.cuda.set_sync_debug_mode("default")
        wanted = here.clip_(params)
        for moved, param in zip(on_cuda, params, strict=True):
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            torch.testing.assert_close(moved.grad.cpu(), grad, rtol=1e-4, atol=1e-6)
        assert float(said.clip_coef) == pytest.approx(wanted.clip_coef, rel=1e-4)
    assert int(said.skipped_steps) == 2


@cuda
@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("name", CLIPPINGS)
def test_a_fused_optimizer_on_cuda(name, optimizer, sync_is_an_error):
    results = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(torch.ones_like(g, device=device)) for g in step_grads(1.0)]
        clipped = clip(fused_on_cuda(optimizer, params), CLIPPINGS[name]())
        for k, length in enumerate(SEQUENCE):
            for param, grad in zip(params, step_grads(length), strict=True):
                param.grad = grad.to(device)
            if k and device == "cuda":
                torch.cuda.synchronize()
                sync_is_an_error()  # from the second step on: the first makes the optimizer's state
            clipped.step()
            torch.cuda.set_sync_debug_mode("default")
        results.append([param.detach().cpu() for param in params])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@cuda
@pytest.mark.parametrize("name", CLIPPINGS)
def test_error_and_resume_on_cuda(name):
    param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.full_like(param, torch.nan)
    with pytest.raises(NonFiniteGradientError):
        CLIPPINGS[name](nonfinite="error").clip_([param])
    one, other = CLIPPINGS[name](), CLIPPINGS[name]()
    for k in range(6):
        if k == 3:
            other.load_state_dict(one.state_dict())
        for clipping in (one,) if k < 3 else (one, other):
            param.grad = torch.full_like(param, 1.0 + k)
            clipping.clip_([param])
    assert [float(v) for v in one.telemetry] == [float(v) for v in other.telemetry]


@cuda
@pytest.mark.parametrize("name", CLIPPINGS)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_captured_step_replays_as_eager(name, optimizer):
    """A CUDA graph of the step does what the step does, draws and bounded histories included."""
    settings = {"window": 8} if "auto" in name else {}
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 0.1, "capturable": True}}[optimizer]
    finals = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(size, device="cuda")) for size in (3, 50)]
        for param in params:
            param.grad = torch.zeros_like(param)
        clipped = clip(
            getattr(torch.optim, optimizer)(params, fused=True, **options), CLIPPINGS[name](**settings)
        )

        def feed(params=params, generator=generator):
            scale = 3 * torch.rand((), generator=generator).item()
            for param in params:
                param.grad.copy_(scale * torch.randn(param.shape, generator=generator))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                feed()
                clipped.step()
        torch.cuda.current_stream().wait_stream(side)
        step = clipped.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                clipped.step()
            step = graph.replay
        for _ in range(20):
            feed()
            step()
        assert clipped.clipping.state_dict()["steps"] == 23
        finals.append([param.detach().cpu() for param in params])
    for eager, replayed in zip(*finals, strict=True):
        assert torch.equal(eager, replayed)
