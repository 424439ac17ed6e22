"""Which preset a launch takes, and why it says so."""

from __future__ import annotations

import re

import pytest
import torch

from experiments.errors import UserError
from experiments.tasks import cola
from experiments.training.presets import Presets, conf_dir


@pytest.mark.parametrize(
    ("cuda", "missing", "chosen", "name", "why"),
    [
        (False, None, None, "mini", "no CUDA device; preset=paper"),
        (True, None, None, "paper", "data is at hand; preset=mini"),
        (True, "CoLA: not in the cache", None, "mini", "preset=paper lacks CoLA: not in the cache"),
        (False, None, "reference", "reference", "as asked"),
    ],
)
def test_default_is_paper_where_it_can_run(monkeypatch, cuda, missing, chosen, name, why):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(cola, "missing_for_paper", lambda given: asked.append(given) or missing)
    presets = Presets(chosen, {"data_dir": "some/folder", "task.model.name_or_path": "null"})
    for _ in range(2):
        found, told = presets.name("cola")
    assert found == name
    assert why in told
    assert asked == ([{"data_dir": "some/folder"}] if cuda else [])  # tried once a launch


def test_a_task_with_one_preset_takes_it():
    assert Presets(None, {}).name("quadratic") == ("mini", "the only one of this task")


def test_preset_gives_the_defaults_of_its_groups():
    assert Presets("paper", {}).value("optimizer", "cola") == "adam"
    assert Presets("reference", {}).value("scheduler", "cola") == "linear"
    presets = Presets("papre", {})
    with pytest.raises(UserError, match="task cola has no preset 'papre'; it has mini, paper, reference"):
        presets.value("optimizer", "cola")
    assert presets.complaint is not None


def test_without_network_or_cache_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(cola, "reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    told = cola.missing_for_paper({})
    assert "bert-base-uncased (give task.model.name_or_path)" in told
    assert "CoLA (give data_dir)" in told
    assert "CoLA" not in cola.missing_for_paper({"data_dir": "somewhere"})
    assert cola.missing_for_paper({"data_dir": "somewhere", "task.model.name_or_path": "my-bert"}) is None
    monkeypatch.setattr(cola, "reachable", lambda: True)
    assert cola.missing_for_paper({}) is None


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
