"""Gradient norms at frozen weights: what is measured, and the folder it comes into."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments.errors import UserError
from experiments.runs import Run, find_runs
from experiments.tasks.base import EpochLoader, Output, Task
from experiments.tasks.quadratic import Quadratic
from experiments.training.precision import Precision
from experiments.training.recorder import Diverged
from experiments.training.tails import Gradients, as_trained, mean_gradient, noise

CPU = torch.device("cpu")
QUICK = ("task=quadratic", "samples=100", "quiet=true")


def gradients(task: Task, samples: int, seed: int = 0) -> Gradients:
    task.load()
    torch.manual_seed(0)
    return Gradients(
        task,
        task.build_model(),
        task.train_loader(seed),
        seed=seed,
        samples=samples,
        precision=Precision("fp32", CPU),
        device=CPU,
    )


class Rows(torch.utils.data.Dataset):
    """Ten rows of three random numbers."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self._rows[index]}


class Small(Task):
    """A model with dropout and batch norm, and a parameter that gets no gradient."""

    metric = "loss"

    def __init__(self, rows: torch.Tensor | None = None) -> None:
        rows = torch.randn(10, 3, generator=torch.Generator().manual_seed(1)) if rows is None else rows
        self._rows = Rows(rows)

    def load(self) -> None:
        pass

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        model.unused = nn.Parameter(torch.ones(2))
        return model.eval()

    def train_loader(self, seed: int) -> EpochLoader:
        return EpochLoader(self._rows, 5, seed)

    def forward(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Output:
        return Output(nn.Sequential.forward(model, batch["x"]).square().mean(), len(batch["x"]))


def test_norms_are_those_of_the_problem():
    """The quadratic's gradient is known: curvature times x plus the loader's noise."""
    task, samples = Quadratic(), 50
    measured = gradients(task, samples, seed=3)
    mean = mean_gradient(measured)
    records = pd.DataFrame(noise(measured, mean, seed=3))

    loader = task.train_loader(3)
    loader.set_epoch(0)
    xi = np.stack([batch["noise"].double().numpy() for _, batch in zip(range(samples), loader, strict=False)])
    g = np.linspace(0.1, 1, 20) + xi
    assert mean.norm == pytest.approx(np.linalg.norm(g.mean(0)), rel=1e-5)
    np.testing.assert_allclose(records["grad_norm"], np.linalg.norm(g, axis=1), rtol=1e-5)
    centred = g - g.mean(0)
    np.testing.assert_allclose(records["noise_norm"], np.linalg.norm(centred, axis=1), rtol=1e-5)
    np.testing.assert_allclose(records["train/loss"], 5.5, rtol=1e-6)
    # The projection is on a vector of length 1: least squares finds it, and nothing is left.
    direction, residual, *_ = np.linalg.lstsq(centred, records["noise_projection"], rcond=None)
    assert np.linalg.norm(direction) == pytest.approx(1, rel=1e-5)
    assert np.abs(residual).max() < 1e-8
    assert records["step"].tolist() == list(range(1, samples + 1))
    assert records["epoch"].iloc[-1] == samples / 10_000


def test_both_passes_see_the_same_gradients_in_training_mode():
    measured = gradients(Small(), 6)
    model = measured._model
    before = {name: param.clone() for name, param in model.named_parameters()}
    first, second = list(measured), list(measured)
    for one, other in zip(first, second, strict=True):
        for part, again in zip(one.parts, other.parts, strict=True):
            assert torch.equal(part, again)
    assert model.training
    assert [gradient.epoch for gradient in first] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert len({float(gradient.loss) for gradient in first}) == 6  # each batch has dropout of its own
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name])
        assert param.grad is None
    assert any(not part.any() for part in first[0].parts)  # of the unused one


def test_a_gradient_that_is_not_finite_is_left_out_of_the_mean_only():
    rows = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    rows[0] = math.inf
    measured = gradients(Small(rows), 4)
    mean = mean_gradient(measured)
    assert mean.finite == 2  # one of the two batches of each epoch has that row
    records = pd.DataFrame(noise(measured, mean, seed=0))
    assert records["grad_norm"].isna().sum() == 2
    assert records["noise_norm"].notna().sum() == 2
    with pytest.raises(Diverged, match="no batch gave a finite gradient"):
        mean_gradient(gradients(Small(torch.full((10, 3), math.nan)), 4))


@pytest.fixture
def tails(clipbench, monkeypatch):
    """``clipbench tails`` without its report."""
    monkeypatch.setattr("experiments.analysis.tails.report", lambda run: "the report")
    return lambda *argv: clipbench("tails", *argv)


def only(root: str = "results/tails") -> Run:
    (run,) = find_runs(root)
    return run


def test_a_measurement_has_a_folder_of_its_own(tails, capsys):
    assert tails(*QUICK, "seed=7") == 0
    run = only()
    assert capsys.readouterr().out.splitlines()[-2:] == ["the report", str(run.path)]
    assert run.path.parts[:4] == ("results", "tails", "quadratic-mini", "initial")
    assert run.path.name == "seed=7"
    assert run.status["status"] == "ok"
    records = run.records()
    assert records["step"].tolist() == list(range(1, 101))
    assert records.notna().all().all()
    summary = run.summary()
    assert summary["parameters"] == 20
    assert (summary["not_finite"], summary["checkpoint"], summary["steps"]) == (0, None, 100)
    assert run.config()["task"]["noise"] == "student"
    assert not run.checkpoints_dir.exists()


def test_what_is_measured_is_not_measured_again(tails, capsys, monkeypatch):
    assert tails(*QUICK) == 0
    run = only()
    before = run.records()
    stamps = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(Quadratic, "load", None)  # not even the data is read
        assert tails(*QUICK) == 0
    assert "already ok: 100 gradients at the initial weights" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == stamps
    assert tails(*QUICK, "force=true") == 0
    pd.testing.assert_frame_equal(run.records(), before, check_exact=True)
    assert json.loads((run.path / "status.json").read_text())["status"] == "ok"


def test_one_that_was_cut_short_begins_anew(tails, monkeypatch):
    from experiments.training import tails as module

    def killed(*arguments):
        yield from ({"step": step, "grad_norm": 1.0} for step in range(1, 101))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "noise", killed)
        assert tails(*QUICK) == 130
    run = only()
    assert run.status["status"] == "killed"
    assert len(run.records()) == 100
    assert tails(*QUICK) == 0
    assert run.status["status"] == "ok"
    assert run.records()["noise_norm"].notna().sum() == 100


def test_a_failure_is_recorded_and_tried_again(tails, monkeypatch, capsys):
    from experiments.training import tails as module

    def fails(*arguments):
        raise MemoryError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(module, "mean_gradient", fails)
        assert tails(*QUICK) == 1
    assert only().status["status"] == "oom"
    assert "too much" in capsys.readouterr().out
    assert tails(*QUICK) == 0
    assert only().status["status"] == "ok"


def test_what_changes_the_numbers_has_another_folder_and_the_seed_a_neighbour(tails):
    folders = set()
    for settings in (
        (),
        ("samples=101",),
        ("task.noise=gaussian",),
        ("precision=bf16",),
        ("seed=1",),
        ("results_dir=elsewhere",),
    ):
        assert tails(*QUICK, *settings) == 0
        root = "elsewhere" if "results_dir=elsewhere" in settings else "results"
        folders |= {(run.names["digest"], run.names["seed"]) for run in find_runs(f"{root}/tails")}
    assert len(folders) == 5
    assert len({digest for digest, _ in folders}) == 4


def trained(clipbench, *settings: str) -> Run:
    argv = ("task=quadratic", "max_steps=20", "eval_every=10", "quiet=true", *settings)
    assert clipbench("run", *argv) == 0
    return find_runs("results/runs")[-1]


def test_weights_of_a_checkpoint(tails, clipbench):
    run = trained(clipbench, "keep=all", "task.noise=gaussian", "task.scale=0")
    weights = {step: run.checkpoint_path(f"step={step}") for step in (10, 20)}
    losses = {}
    for step, path in weights.items():
        assert tails("samples=100", f"checkpoint={path}", "quiet=true") == 0
        (measured,) = find_runs(f"results/tails/quadratic-mini/sgd-norm-step={step}")
        assert measured.summary()["checkpoint_step"] == step
        assert measured.config()["task"]["noise"] == "gaussian"  # as it was trained
        x = torch.load(path, weights_only=True)["state"]["model"]["x"]
        expected = (0.5 * torch.linspace(0.1, 1, 20) * x.square()).sum()
        losses[step] = measured.records()["train/loss"].mean()
        assert losses[step] == pytest.approx(expected.item(), rel=1e-5)
        assert measured.summary()["mean_grad_norm"] == pytest.approx(
            float((torch.linspace(0.1, 1, 20) * x).norm()), rel=1e-5
        )
    assert losses[20] < losses[10]
    assert tails("samples=100", f"checkpoint={run.path}", "quiet=true") == 0
    (best,) = find_runs("results/tails/quadratic-mini/sgd-norm-best")
    assert best.summary()["checkpoint_step"] == run.summary()["best"]["step"]


def test_other_weights_of_the_same_name_are_measured_too(tails, clipbench):
    run = trained(clipbench)
    argv = ("samples=100", f"checkpoint={run.path}", "quiet=true")
    assert tails(*argv) == 0
    content = torch.load(run.checkpoint_path("best"), weights_only=True)
    content["model"]["x"] += 1
    torch.save(content, run.checkpoint_path("best"))
    assert tails(*argv) == 0
    first, second = (measured.records() for measured in find_runs("results/tails"))
    assert (first["train/loss"] != second["train/loss"]).all()


def test_the_task_is_as_it_was_trained_but_for_what_is_given(tails, clipbench):
    run = trained(clipbench, "task.noise=gaussian", "task.scale=0.5")
    assert tails("samples=100", f"checkpoint={run.path}", "task.scale=2", "quiet=true") == 0
    assert only().config()["task"] | {"_target_": ""} == {"_target_": "", "noise": "gaussian", "scale": 2}
    assert only().summary()["settings"] == "scale=2, noise=gaussian"


def test_settings_of_nested_nodes_are_taken_over_one_by_one():
    task = {"model": {"width": 16, "aggr": "mean"}, "data_dir": None, "fan_out": [5, 5], "new": 1}
    run = {"model": {"width": 32, "aggr": "add"}, "data_dir": "there", "fan_out": [3, 3]}
    assert as_trained(task, run, {}) == {**run, "new": 1}
    given = {"task.model.width": "16", "data_dir": "null", "task.fan_out": "[5,5]"}
    assert as_trained(task, run, given) == {**task, "model": {"width": 16, "aggr": "add"}}


def test_what_cannot_be_measured_at(tails, clipbench, tmp_path, capsys):
    run = trained(clipbench)
    capsys.readouterr()

    def told(*argv: str) -> str:
        assert tails("quiet=true", *argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    assert "there is no nowhere" in told("checkpoint=nowhere")
    assert "the checkpoint is of task=quadratic, got task=cola" in told(f"checkpoint={run.path}", "task=cola")
    (tmp_path / "damaged.pt").write_bytes(b"no checkpoint")
    assert "cannot read the checkpoint damaged.pt" in told("checkpoint=damaged.pt", "task=quadratic")
    torch.save({"step": 3}, "empty.pt")
    assert "empty.pt is no checkpoint of a run" in told("checkpoint=empty.pt", "task=quadratic")
    torch.save({"step": 3, "model": {"x": torch.ones(3)}}, "other.pt")
    assert "its weights do not fit this model" in told("checkpoint=other.pt", "task=quadratic")
    bare = trained(clipbench, "keep=none", "seed=5")
    capsys.readouterr()
    assert "has kept no checkpoint" in told(f"checkpoint={bare.path}")
    assert not (tmp_path / "results" / "tails").exists()


def test_half_precision_is_refused_and_settings_are_checked(tails, capsys):
    for setting, message in (
        ("precision=fp16", "precision must be fp32 or bf16 here, got fp16"),
        ("samples=99", "samples must be a whole number from 100 to"),
        ("device=tpu", "device must be auto, cpu, cuda or cuda:N"),
        ("data_dir=here", "task quadratic has no data that data_dir=here could replace"),
    ):
        assert tails("task=quadratic", setting) == 2
        assert message in capsys.readouterr().err


def test_a_task_of_two_names_is_no_path():
    with pytest.raises(UserError, match="letters, digits"):
        Run.locate_tails("results", task="a/b", preset="mini", weights="initial", digest="0", seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_measures_the_same(tails):
    for device in ("cpu", "cuda"):
        assert tails(*QUICK, f"device={device}", f"results_dir={device}") == 0
    on_cpu, on_cuda = (only(f"{device}/tails").records() for device in ("cpu", "cuda"))
    pd.testing.assert_frame_equal(on_cpu, on_cuda, rtol=1e-4)
