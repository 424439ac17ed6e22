"""Which preset a launch takes, and why it says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.errors import UserError
from experiments.tasks import needs
from experiments.tasks.cola import FILES
from experiments.training.presets import Presets, conf_dir
from torch_clip import CLIPPINGS


@pytest.mark.parametrize(
    ("cuda", "missing", "chosen", "name", "why"),
    [
        (False, None, None, "mini", "no CUDA device; preset=paper"),
        (True, None, None, "paper", "data is at hand; preset=mini"),
        (
            True,
            "CoLA: not in the cache",
            None,
            "mini",
            "preset=paper is out of reach: CoLA: not in the cache",
        ),
        (False, None, "reference", "reference", "as asked"),
    ],
)
def test_default_is_paper_where_it_can_run(monkeypatch, cuda, missing, chosen, name, why):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        Presets, "_missing_for_paper", lambda presets, task: asked.append(presets.given) or missing
    )
    presets = Presets(chosen, {"data_dir": "some/folder", "task.model.name_or_path": "null"})
    for _ in range(2):
        found, told = presets.name("cola")
    assert found == name
    assert why in told
    assert asked == ([{"data_dir": "some/folder"}] if cuda else [])  # tried once a launch


def test_a_task_with_one_preset_takes_it():
    assert Presets(None, {}).name("quadratic") == ("mini", "the only one of this task")


@pytest.mark.parametrize("cuda", [False, True])
def test_an_experiment_may_choose_the_preset(monkeypatch, cuda):
    """With all that a preset chooses by default, whatever device there is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    choices = {"task": "cola", "preset": "cola/frozen", "experiment": "cola_adam"}
    of_experiment = Presets(None, {"experiment": "cola_adam"})
    assert of_experiment.line(choices) == "task=cola preset=frozen: experiment=cola_adam says so"
    assert of_experiment.value("scheduler", "cola") == "constant"
    assert Presets("mini", {"experiment": "cola_adam"}).value("scheduler", "cola") == "linear"
    assert Presets("frozen", {}).line(choices) == "task=cola preset=frozen: as asked"
    for without in ("mini_comparison", "regression", "misspelt", ""):
        monkeypatch.setattr(Presets, "_missing_for_paper", lambda presets, task: None)
        told = Presets(None, {"experiment": without}).name("voc")
        assert told[0] == ("paper" if cuda else "mini")


def test_preset_gives_the_defaults_of_its_groups():
    assert Presets("paper", {}).value("optimizer", "cola") == "adam"
    assert Presets("reference", {}).value("scheduler", "cola") == "linear"
    presets = Presets("papre", {})
    with pytest.raises(
        UserError, match="task cola has no preset 'papre'; it has frozen, mini, paper, reference"
    ):
        presets.value("optimizer", "cola")
    assert presets.complaint is not None


@pytest.fixture
def no_data(monkeypatch):
    """A CUDA device, no network, and empty caches; gives what was asked for."""
    import datasets

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(needs, "reachable", lambda url: asked.append(url))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: {}[names])
    return asked


def test_without_network_or_cache_the_reason_says_what_is_missing(no_data, tmp_path):
    name, why = Presets(None, {}).name("cola")
    assert name == "mini"
    assert why.startswith(
        "preset=paper is out of reach: cannot get CoLA: no network, and no earlier download"
    )
    assert no_data == ["https://huggingface.co/datasets/nyu-mll/glue"]
    given = {"data_dir": str(write_cola(tmp_path)), "task.batch_size": "8,16", "optimizer.lr": "1,2"}
    assert "cannot get the model 'bert-base-uncased'" in Presets(None, given).name("cola")[1]
    assert "no such folder" in Presets(None, given | {"task.model.name_or_path": "./x"}).name("cola")[1]


def test_what_is_given_or_can_be_fetched_is_not_missing(no_data, monkeypatch, tmp_path):
    given = {
        "data_dir": f"'{write_cola(tmp_path)}'",
        "task.model": "{config:{hidden_size:8},name_or_path:null}",
    }
    assert Presets(None, given).name("cola")[0] == "paper"
    assert no_data == []
    monkeypatch.setattr(needs, "reachable", lambda url: True)
    assert Presets(None, {}).name("cola")[0] == "paper"


def write_cola(root: Path) -> Path:
    (root / "raw").mkdir()
    for name in FILES:
        (root / name).write_text("a\t1\t\tA sentence.\n")
    return root


def test_bad_input_met_on_the_way_is_kept_for_the_message(no_data):
    presets = Presets(None, {"task.batch_size": "0"})
    with pytest.raises(UserError, match="batch_size must be a whole number of at least 1, got 0"):
        presets.name("cola")
    assert presets.complaint is not None


FOLLOW_PRESET = ["norm", "linear_rand_norm", "quadratic_rand_norm", "smooth", "smooth_sqrt"]


@pytest.mark.parametrize("clipping", sorted(CLIPPINGS))
def test_the_presets_threshold_is_that_of_global_norms(clipping, composed):
    """Thresholds of tensors, rows and elements are of another size."""
    silent, telling = (
        composed(f"clipping={clipping}", f"task={task}") for task in ("quadratic", "expectation")
    )
    assert telling.preset.threshold == 100.0
    if clipping in FOLLOW_PRESET:
        assert (silent.clipping.threshold, telling.clipping.threshold) == (1.0, 100.0)
        assert (
            composed(f"clipping={clipping}", "task=expectation", "clipping.threshold=7").clipping.threshold
            == 7
        )
    else:
        assert telling.clipping == silent.clipping


def test_the_presets_threshold_reaches_a_chain(composed):
    assert composed("clipping=chain", "task=expectation").clipping._args_[1].threshold == 100.0


@pytest.mark.parametrize(
    ("optimizer", "paper", "reference"),
    [("sgd", 0.0, 1e-4), ("adam", 0.0, 1e-4), ("adamw", 0.01, 0.01)],  # AdamW's is another quantity
)
def test_weight_decay_is_that_of_the_preset(optimizer, paper, reference, composed):
    for preset, expected in (("paper", paper), ("reference", reference)):
        config = composed("task=imagenet", f"preset=imagenet/{preset}", f"optimizer={optimizer}")
        assert config.optimizer.weight_decay == expected
    given = composed(
        "task=imagenet", "preset=imagenet/reference", "optimizer=sgd", "optimizer.weight_decay=1"
    )
    assert (given.optimizer.weight_decay, given.optimizer.momentum) == (1, 0.9)


@pytest.mark.parametrize("task", sorted(path.stem for path in (conf_dir() / "task").glob("*.yaml")))
def test_every_preset_gives_what_the_options_refer_to(task):
    import yaml

    options = [conf_dir() / "run.yaml", conf_dir() / "task" / f"{task}.yaml"]
    options += (conf_dir() / "scheduler").glob("*.yaml")
    keys = {key for path in options for key in re.findall(r"\$\{preset\.(\w+)", path.read_text())}
    assert {"max_steps", "eval_every", "warmup_steps"} <= keys
    presets = list((conf_dir() / "preset" / task).glob("*.yaml"))
    assert presets
    for preset in presets:
        values = yaml.safe_load(preset.read_text())
        assert keys | {"scheduler", "optimizer", "lr"} <= set(values), preset
        assert {path.stem for path in (conf_dir() / "optimizer").glob("*.yaml")} == set(values["lr"]), preset
