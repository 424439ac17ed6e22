"""Half precision, compiling and accumulating change how a step is computed, not what is clipped."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import torch_clip
from experiments.runs import Run, find_runs
from experiments.tasks.base import Output
from experiments.training.batches import Batches
from experiments.training.clock import HostClock
from experiments.training.precision import Precision
from experiments.training.ranks import Ranks
from experiments.training.recorder import Recorder
from experiments.training.state import State
from experiments.training.train import Budget, train
from torch_clip.clipping import Transform
from torch_clip.methods import NormClip

CPU = torch.device("cpu")
COLA = [
    *("run", "task=cola", "task.num_train=320", "task.num_val=60", "task.batch_size=16", "warmup_steps=0"),
    *("max_steps=6", "eval_every=6", "optimizer=sgd", "optimizer.lr=0.05", "clipping=norm", "quiet=true"),
    *("optimizer.momentum=0", "keep=last"),
]


def ran(root: str) -> Run:
    (run,) = find_runs(root)
    return run


def column(root: str, name: str) -> np.ndarray:
    return ran(root).records()[name].dropna().to_numpy()


def weights(root: str) -> torch.Tensor:
    state = torch.load(ran(root).checkpoint_path("last"), weights_only=True)["state"]
    return torch.cat([tensor.flatten().float() for tensor in state["model"].values()])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_records_the_norm_of_the_true_gradient(precision, clipbench):
    assert clipbench(*COLA, "results_dir=fp32") == 0
    assert clipbench(*COLA, f"precision={precision}", "results_dir=half") == 0
    assert ran("half").path.parent.name != ran("fp32").path.parent.name
    for name in ("grad_norm", "train/loss", "clip_coef"):
        half, whole = column("half", name), column("fp32", name)
        np.testing.assert_allclose(half, whole, rtol=0.05)
        assert (half != whole).any()
    # The norm at the first point, where both are the same model, is as near as 8 or 11 bits allow.
    assert column("half", "grad_norm")[0] == pytest.approx(column("fp32", "grad_norm")[0], rel=5e-3)


class OneLayer:
    """A task whose scaled gradients overflow float16 at first, and no longer when the scale has fallen."""

    def forward(self, model, batch):
        return Output(model(batch["x"]).square().mean(), size=1)

    def metrics(self, tally):
        return {}

    def evaluate(self, model, device):
        return 0.0, {}


class Same:
    def __len__(self):
        return 100

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        return iter([{"x": torch.full((4, 8), 30.0)}] * 100)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_overflow_are_skipped_counted_and_lower_the_scale(optimizer, fused):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    before = model.weight.detach().clone()
    twin = copy.deepcopy(model)
    first = twin(next(iter(Same()))["x"])
    optimizer = torch_clip.clip(optimizer(model.parameters(), lr=1e-4, fused=fused), NormClip(1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    precision = Precision("fp16", CPU)
    recorder, ranks = Recorder(1, CPU), Ranks(0, 1, CPU)
    state = State(
        model, optimizer, schedule, precision.scaler(), Batches(Same()), recorder, HostClock(), ranks
    )
    moments = train(OneLayer(), state, Budget(12, 12, 1, 12), precision, device=CPU)
    records, still = [], []
    for moment in moments:
        records += [record for record in moment.records if "lr" in record]
        still.append(torch.equal(model.weight, before))
    norms = [record["grad_norm"] for record in records]
    skipped = sum(np.isinf(norms))
    assert 0 < skipped < 12
    assert norms[:skipped] == [np.inf] * skipped
    assert still[: skipped + 1] == [True] * skipped + [False]
    assert optimizer.clipping.telemetry.skipped_steps == skipped
    assert state.scaler.get_scale() == 65536 / 2**skipped
    first.square().mean().backward()
    assert norms[skipped] == pytest.approx(NormClip().clip_(twin.parameters()).grad_norm, rel=1e-2)


def test_fp16_needs_a_clipping_that_skips(clipbench, capsys):
    assert clipbench(*COLA, "precision=fp16", "clipping.nonfinite=propagate") == 2
    assert "clipping.nonfinite must be skip with precision=fp16" in capsys.readouterr().err
    assert find_runs("results") == []


def test_accumulated_batches_make_one_step_clipped_once(clipbench):
    assert clipbench(*COLA, "results_dir=one") == 0
    assert clipbench(*COLA, "task.batch_size=8", "accumulate=2", "results_dir=two") == 0
    for name in ("grad_norm", "train/loss", "clip_coef", "epoch"):
        np.testing.assert_allclose(column("two", name), column("one", name), rtol=1e-4)
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-4, atol=1e-6)
    assert column("one", "clip_coef").min() < 1
    saved = torch.load(ran("two").checkpoint_path("last"), weights_only=True)["state"]
    assert saved["optimizer"]["clipping"]["steps"] == 6


def test_the_clipping_is_told_the_loss_of_the_coming_step(clipbench, monkeypatch):
    told = []
    monkeypatch.setattr(Transform, "observe", lambda clipping, loss: told.append(loss.item()))
    assert clipbench(*COLA, "accumulate=2", "max_steps=3") == 0
    assert told == column("results", "train/loss").tolist()


def test_where_compiling_fails_a_message_says_so_and_the_numbers_are_the_same(clipbench, monkeypatch, capsys):
    dropout = "preset.model.config.hidden_dropout_prob=0.3"
    assert clipbench(*COLA, dropout, "results_dir=plain") == 0

    def compile(model):
        def compiled(*args, **kwargs):
            torch.rand(7)  # as far as it came
            raise RuntimeError("no\n compiler")

        model._compiled_call_impl = compiled

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    assert clipbench(*COLA, dropout, "compile=true", "results_dir=compiled") == 0
    assert "torch.compile fails, going on without it: no compiler" in capsys.readouterr().err
    assert ran("compiled").summary()["compiled"] is False
    assert ran("compiled").path.parent.name != ran("plain").path.parent.name
    assert torch.equal(weights("compiled"), weights("plain"))


def test_a_compiled_model_starts_where_the_plain_one_does(clipbench, monkeypatch):
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: whole(model, backend="eager"))
    assert clipbench(*COLA, "results_dir=plain") == 0
    assert clipbench(*COLA, "compile=true", "results_dir=compiled") == 0
    assert ran("compiled").summary()["compiled"] is True
    np.testing.assert_allclose(column("compiled", "train/loss"), column("plain", "train/loss"), rtol=1e-5)
    torch.testing.assert_close(weights("compiled"), weights("plain"), rtol=1e-4, atol=1e-6)
