"""The examples of tests/examples, run as they stand, do what the README promises of them."""

from __future__ import annotations

import copy
import math
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import torch_clip

EXAMPLES = Path(__file__).parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "conftest")
WORLD = 2
DISTRIBUTED = ["ddp", "fsdp2", "distributed_checkpoint"]
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_shown(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 30
    shown = re.findall(r"tests/examples/(\w+)\.py", (EXAMPLES.parents[1] / "README.md").read_text())
    assert name in shown
    assert f"test_{name}" in globals(), "every example has a test of its name"


def run(name):
    """The names that the program leaves behind."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Programs write to the current folder, and seed torch's generator."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield


def clip_as_torch_does(optimizer, clipping):
    """In place of `torch_clip.clip`: torch's own function, with a threshold that numpy finds."""
    norms = []

    def clip_now():
        params = [param for group in optimizer.param_groups for param in group["params"]]
        norms.append(torch.nn.utils.clip_grad_norm_(params, math.inf).item())
        percentile = getattr(clipping.threshold, "percentile", None)
        threshold = clipping.threshold.value if percentile is None else np.quantile(norms, percentile)
        torch.nn.utils.clip_grad_norm_(params, threshold)
        optimizer.clipped_steps += norms[-1] > threshold

    def before_step(optimizer, args, kwargs):
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return clip_now()

        def clipped_closure():
            loss = closure()
            clip_now()
            return loss

        return (args[0], clipped_closure), {}

    optimizer.register_step_pre_hook(before_step)
    optimizer.norms, optimizer.clipped_steps = norms, 0
    optimizer.clipping = SimpleNamespace(telemetry=None)
    return optimizer


@pytest.fixture
def run_both(monkeypatch):
    """The example, and the same with torch's clipping."""

    def both(name):
        ours = run(name)
        with monkeypatch.context() as patch:
            patch.setattr(torch_clip, "clip", clip_as_torch_does)
            Path("torchs").mkdir()
            patch.chdir("torchs")
            return ours, run(name)

    return both


def assert_same_training(ours, torchs, optimizer="optimizer", model="model"):
    """Equal norms, clipped steps and parameters; with some steps clipped and others not."""
    optimizer, reference = getattr(ours, optimizer), getattr(torchs, optimizer)
    assert not hasattr(reference.clipping, "clip_"), "the reference is not torch's"
    if model is not None:
        torch.testing.assert_close(
            params_of(getattr(ours, model)), params_of(getattr(torchs, model)), **CLOSE
        )
    telemetry = optimizer.clipping.telemetry
    assert float(telemetry.grad_norm) == pytest.approx(reference.norms[-1], rel=1e-4)
    assert int(telemetry.steps) == len(reference.norms)
    assert int(telemetry.clipped_steps) == reference.clipped_steps
    assert 0 < reference.clipped_steps < len(reference.norms)


def same(one, other):
    """Equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def params_of(model):
    return [
        (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for param in model.parameters()
    ]


def test_plain_loop(run_both):
    assert_same_training(*run_both("plain_loop"))


def test_closure(run_both):
    ours, torchs = run_both("closure")
    assert_same_training(ours, torchs, "sgd", model=None)
    assert ours.losses == pytest.approx(torchs.losses, rel=1e-3)
    # Every inner evaluation of LBFGS, several a step, is clipped and counted.
    steps = ours.lbfgs.clipping.telemetry.steps
    assert steps == ours.lbfgs.state[next(ours.model.parameters())]["func_evals"] > 4
    assert steps == len(torchs.lbfgs.norms)


def test_gradient_accumulation(run_both):
    ours, torchs = run_both("gradient_accumulation")
    assert_same_training(ours, torchs)
    assert ours.optimizer.clipping.telemetry.steps == 20
    # The same as whole batches.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = clip_as_torch_does(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ours.optimizer.clipping
    )
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(ours.x), ours.y).backward()
        optimizer.step()
    torch.testing.assert_close(params_of(ours.model), params_of(model), **CLOSE)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_amp(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    ours = run("amp")
    assert ours.device == device
    # torch's recipe, from the same start.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).to(ours.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(ours.device)
    norms = []

    def backward(model, optimizer, scaler, factor=1.0):
        optimizer.zero_grad()
        with torch.autocast(ours.device, dtype=torch.float16):
            loss = nn.functional.mse_loss(model(ours.x), ours.y)
        scaler.scale(loss * factor).backward()

    for _ in range(20):
        backward(model, optimizer, scaler)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
        if math.isfinite(norm):
            norms.append(norm)
            nn.utils.clip_grad_norm_(model.parameters(), np.quantile(norms, 0.5))
        scaler.step(optimizer)
        scaler.update()
    assert max(norms) < 100 < scaler.get_scale() == ours.scaler.get_scale()
    torch.testing.assert_close(params_of(ours.model), params_of(model), **CLOSE)
    history = ours.optimizer.clipping.threshold.history
    torch.testing.assert_close(history, torch.tensor(sorted(norms), dtype=torch.float64), rtol=1e-3, atol=0)

    before = copy.deepcopy((params_of(ours.model), ours.optimizer.state_dict()["state"]))
    backward(ours.model, ours.optimizer, ours.scaler, factor=math.inf)
    ours.scaler.step(ours.optimizer)
    ours.scaler.update()
    assert same((params_of(ours.model), ours.optimizer.state_dict()["state"]), before)
    assert torch.equal(ours.optimizer.clipping.threshold.history, history)
    assert ours.scaler.get_scale() == scaler.get_scale() / 2


def test_half_precision():
    ours = run("half_precision")
    assert set(ours.optimizers) == {torch.bfloat16, torch.float16}
    for dtype, optimizer in ours.optimizers.items():
        params = optimizer.param_groups[0]["params"]
        assert all(param.dtype is dtype and param.isfinite().all() for param in params)
        telemetry = optimizer.clipping.telemetry
        assert (telemetry.steps, telemetry.skipped_steps) == (20, 0)
        assert 0 < telemetry.clipped_steps < 20
        # As long as the gradient was, though a float16 holds no square of 500 and a bfloat16 no sum of many.
        exact = 0.0
        for param in params:
            param.grad = torch.linspace(400, 600, param.numel()).view_as(param).to(dtype)
            exact += param.grad.double().square().sum().item()
        optimizer.step()
        assert optimizer.clipping.telemetry.grad_norm == pytest.approx(math.sqrt(exact), rel=1e-4)


def test_schedulers(run_both):
    ours, torchs = run_both("schedulers")
    assert_same_training(ours, torchs)
    assert ours.decay.get_last_lr() == torchs.decay.get_last_lr() != [0.1]


@pytest.mark.slow
def test_compiled(run_both):
    # Compiled with torch's clipping in a hook, the reference would be of another kind: it is not compiled.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda it: it)
        _, torchs = run_both("compiled")
    ours = run("compiled")
    assert_same_training(ours, torchs)
    torch._dynamo.reset()


def test_ema(run_both):
    ours, torchs = run_both("ema")
    assert_same_training(ours, torchs)
    assert_same_training(ours, torchs, model="averaged")
    assert not torch.equal(params_of(ours.averaged)[0], params_of(ours.model)[0])


def test_own_loop():
    ours = run("own_loop")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(ours.x), ours.y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    torch.testing.assert_close(params_of(ours.model), params_of(model), **CLOSE)
    assert ours.telemetry.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert 0 < ours.telemetry.clipped_steps < ours.telemetry.steps == 20


def test_optimizer_in_backward():
    ours = run("optimizer_in_backward")
    assert all(param.grad is None for param in ours.model.parameters())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer, clipped = torch.optim.SGD(model.parameters(), lr=0.1), 0
    for _ in range(10):
        x = torch.randn(32, 8)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
        clipped += sum(bool(nn.utils.clip_grad_norm_([param], 0.1) > 0.1) for param in model.parameters())
        optimizer.step()
    torch.testing.assert_close(params_of(ours.model), params_of(model), **CLOSE)
    assert clipped == sum(one.clipping.telemetry.clipped_steps for one in ours.optimizers.values()) > 0


# Libraries that train for you.

OTHERS_WARN = pytest.mark.filterwarnings("default:::tests")  # of what is theirs, though it is called here


@OTHERS_WARN
def test_accelerate_loop(run_both, tmp_path):
    pytest.importorskip("accelerate")
    ours, torchs = run_both("accelerate_loop")
    ours.optimizer, torchs.optimizer = ours.optimizer.optimizer, torchs.optimizer.optimizer
    assert_same_training(ours, torchs)
    assert ours.optimizer.clipping.telemetry.steps == 12  # of 24 batches, two for each step

    saved = copy.deepcopy(ours.optimizer.state_dict())
    assert len(saved["clipping"]["history"]) == 12
    ours.accelerator.save_state(str(tmp_path / "state"))
    ours.optimizer.clipping.reset()
    ours.accelerator.load_state(str(tmp_path / "state"))
    assert same(ours.optimizer.state_dict(), saved)


@OTHERS_WARN
def test_hf_trainer(run_both):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    ours, torchs = run_both("hf_trainer")
    assert_same_training(ours, torchs)
    norms = ours.optimizer.clipping.threshold.history
    assert norms.max() > 1.5  # with max_grad_norm=1 none would be longer than 1
    assert norms.tolist() == pytest.approx(sorted(torchs.optimizer.norms), rel=1e-4)

    # From the checkpoint at step 10, in a new trainer with new everything, to the same end.
    wanted, ended = params_of(ours.model), ours.optimizer.state_dict()
    model = ours.Regression()
    optimizer = torch_clip.clip(
        torch.optim.AdamW(model.parameters(), lr=1e-2), torch_clip.methods.AutoClip(percentile=0.5)
    )
    trainer = ours.Trainer(model, ours.settings, train_dataset=ours.data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint="checkpoints/checkpoint-10")
    assert same((params_of(model), optimizer.state_dict()), (wanted, ended))


@OTHERS_WARN
def test_lightning_fit(run_both):
    lightning = pytest.importorskip("lightning")
    ours, torchs = run_both("lightning_fit")
    for result in (ours, torchs):
        result.optimizer = result.model.optimizers().optimizer
    assert_same_training(ours, torchs)

    # From the checkpoint of the last epoch to two more, as without the pause.
    loader = torch.utils.data.DataLoader(ours.data, batch_size=16)
    settings = dict(accelerator="cpu", logger=False, enable_progress_bar=False)
    (checkpoint,) = Path("checkpoints").glob("*epoch=2*12.ckpt")
    torch.manual_seed(0)
    torch.randn(64, 4), torch.randn(64, 1)  # as the example, so that the model starts as its model did
    whole, resumed = ours.Regression(), ours.Regression()
    for model, start in ((whole, None), (resumed, checkpoint)):
        trainer = lightning.Trainer(max_epochs=5, enable_checkpointing=False, **settings)
        trainer.fit(model, loader, ckpt_path=start)
    assert resumed.optimizers().optimizer.clipping.telemetry.steps == 20
    for one, other in ((whole, resumed), (whole.optimizers().optimizer, resumed.optimizers().optimizer)):
        assert same(one.state_dict(), other.state_dict())


@OTHERS_WARN
def test_lightning_hook(run_both):
    pytest.importorskip("lightning")
    ours, (_, torchs) = run("lightning_hook"), run_both("lightning_fit")
    torchs.optimizer = torchs.model.optimizers().optimizer
    ours.optimizer = ours.model
    assert_same_training(ours, torchs)


# Two processes. One launch for all of these examples, since most of its time is importing torch.


def run_rank(names):
    """What one process says of each example: parameters, telemetry, state of the clipping."""
    leave, join = torch.distributed.destroy_process_group, torch.distributed.init_process_group

    def join_once(backend):
        assert backend == "gloo"
        if not torch.distributed.is_initialized():
            join(backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "init_process_group", join_once)
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        said = {}
        for name in names:
            example = run(name)
            said[name] = ending(example)
            if name == "distributed_checkpoint":
                said["resumed"] = ending(run(name))
                go_on(example)
                said["uninterrupted"] = ending(example)
    leave()
    return said


def ending(example):
    clipping = example.optimizer.clipping
    return {
        "params": params_of(example.model),
        "telemetry": tuple(clipping.telemetry),
        "clipping": {key: value for key, value in clipping.state_dict().items() if key != "method"},
    }


def go_on(example):
    """As the second run of distributed_checkpoint, whose generator starts anew."""
    torch.manual_seed(0)
    nn.Linear(4, 4)
    for _ in range(10):
        example.optimizer.zero_grad()
        example.model(torch.randn(8, 4)).square().mean().backward()
        example.optimizer.step()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(WORLD):
        there = dict(
            RANK=rank, WORLD_SIZE=WORLD, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1
        )
        environment = {**os.environ, **{key: str(value) for key, value in there.items()}}
        command = [sys.executable, __file__, f"rank{rank}.pt", *DISTRIBUTED]
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE))
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.fixture
def alone(monkeypatch):
    """The example as one process, which takes the whole batch."""

    def run_alone(name):
        for key, value in dict(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0).items():
            monkeypatch.setenv(key, str(value))
        return run_rank([name])[name]

    return run_alone


def assert_two_are_one(ranks, alone, name):
    wanted = alone(name)
    for rank in ranks:
        for part in ("params", "telemetry", "clipping"):
            torch.testing.assert_close(rank[name][part], wanted[part], **CLOSE)
    # Between ranks bit for bit: thresholds, draws, history, and so the parameters.
    assert same(ranks[0][name], ranks[1][name])
    history = wanted["clipping"]["history"]
    assert history.isfinite().all()
    assert (history > 0).all()
    assert 0 < wanted["clipping"]["clipped_steps"] < wanted["clipping"]["steps"] == len(history)


def test_ddp(ranks, alone):
    assert_two_are_one(ranks, alone, "ddp")


def test_fsdp2(ranks, alone):
    assert_two_are_one(ranks, alone, "fsdp2")


def test_distributed_checkpoint(ranks, alone):
    """Also: the step by which torch makes a fresh optimizer's state is neither counted nor recorded."""
    assert_two_are_one(ranks, alone, "distributed_checkpoint")
    for rank in ranks:
        assert rank["distributed_checkpoint"]["clipping"]["steps"] == 10
        assert rank["resumed"]["clipping"]["steps"] == 20
        assert same(rank["resumed"], rank["uninterrupted"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(run_rank(sys.argv[2:]), sys.argv[1])
