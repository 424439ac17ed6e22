"""The jobs of a sweep are those that Hydra would run."""

from __future__ import annotations

import sys

import hydra
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.tasks import quadratic
from experiments.training.freeze import Composer
from experiments.training.presets import Presets, conf_dir, for_hydra

GRIDS = {
    "lists": ["task=quadratic", "clipping=norm,auto_clip", "seed=2,1"],
    "one": ["task=quadratic"],
    "twice": ["task=quadratic", "seed=0,1", "optimizer.lr=1e-3,0.1,seven"],
    "range": ["task=quadratic", "seed=range(3)", "optimizer.lr=range(0.1,0.4,0.1)"],
    "choice": ["task=quadratic", "optimizer.lr=choice(0.1,0.3)", "optimizer=sort(sgd,adam,reverse=true)"],
    "glob": ["task=quadratic", "clipping=glob(*norm, exclude=[no*,lay*])"],
    "several tasks": ["task=quadratic,regression", "+optimizer.eps=[1,2],{a:3}", "optimizer=adam"],
    "preset": ["task=cola,voc", "preset=mini"],
    "experiment": ["experiment=mine", "seed=5,6"],
    "quotes": ["task=quadratic", "task.noise='student','gau ssian'"],
}


def composer(settings: list[str], folder: str) -> Composer:
    given = dict(setting.split("=", 1) for setting in settings)
    return Composer(Presets(given.get("preset"), given, folder), given, folder)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    """One more folder of configuration, with an experiment that is a sweep."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /task: quadratic\n"
        "optimizer:\n  momentum: 0.${hydra:job.num}\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      seed: range(9)\n      clipping: no_clip,norm\n"
    )
    return str(tmp_path / "conf")


@pytest.mark.parametrize("grid", GRIDS)
def test_they_are_what_hydra_s_own_multirun_gives(grid, folder, monkeypatch):
    settings, wanted = GRIDS[grid], []

    def job(cfg):
        wanted.append(
            (
                OmegaConf.to_container(cfg, resolve=True),
                OmegaConf.to_container(HydraConfig.get().runtime.choices),
                OmegaConf.to_container(HydraConfig.get().overrides.task),
            )
        )

    found = composer(settings, folder)
    given = dict(setting.split("=", 1) for setting in settings)
    monkeypatch.setattr(sys, "argv", ["clipbench", "-m", "--config-dir", folder, *for_hydra(given)])
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="run")(job)()
    jobs = found.grid()
    assert len(jobs) == len(wanted) > 0
    for number, (overrides, (config, choices, its_overrides)) in enumerate(zip(jobs, wanted, strict=True)):
        assert overrides == its_overrides
        composed, its_choices = found._composed(overrides, number)
        assert composed == config
        groups = ("task", "preset", "optimizer", "scheduler", "clipping", "experiment")
        assert {name: its_choices[name] for name in groups} == {name: choices[name] for name in groups}


def test_a_frozen_job_needs_nothing_else(folder):
    found = composer(["task=quadratic", "force=true"], folder)
    job = found.freeze(["task=quadratic", "seed=3"], 0, "seed=3")
    assert job.config["device"] == "cuda" if torch.cuda.is_available() else "cpu"
    assert job.config["force"] is False
    assert job.config["optimizer"]["lr"] == 0.03
    assert job.run.startswith("runs/adhoc/quadratic-mini/sgd-norm/")
    assert job.run.endswith("/seed=3")
    assert found.told == {"task=quadratic preset=mini: the only one of this task": None}


def test_settings_need_only_suit_the_options_that_are_swept(folder):
    """Hydra's own multirun composes with the defaults first, and would refuse."""
    found = composer(["task=choice(quadratic)", "task.noise=gaussian"], folder)
    (overrides,) = found.grid()
    assert found.freeze(overrides, 0).config["task"]["noise"] == "gaussian"


def test_equal_input_is_read_once_a_launch(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(quadratic.Quadratic, "input_files", lambda task: asked.append(task) or [])
    found = composer(["task=quadratic", "seed=0,1", "task.noise=student,gaussian"], folder)
    for number, overrides in enumerate(found.grid()):
        found.freeze(overrides, number)
    assert len(asked) == 2


def test_the_preset_is_decided_once_a_launch(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not asked.append(1))
    monkeypatch.setattr(Presets, "_missing_for_paper", lambda presets, task: "nothing")
    found = composer(["task=cola", "seed=0,1,2", "device=cpu"], folder)
    before = len(asked)
    for number, overrides in enumerate(found.grid()):
        found.freeze(overrides, number)
    assert before == len(asked) == 1


@pytest.mark.parametrize("launcher", ["submitit_slurm"])
def test_where_other_machines_run_the_jobs_their_device_must_be_said(launcher, folder, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    launching = ["task=quadratic", f"hydra/launcher={launcher}"]
    with pytest.raises(UserError, match="device=auto would ask this one"):
        composer(launching, folder).freeze(["task=quadratic"], 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = composer(launching, folder).freeze(["task=quadratic", "device=cuda"], 0)
    assert job.config["device"] == "cuda"
    here = composer(["task=quadratic", "device=cpu"], folder).freeze(["task=quadratic", "device=cpu"], 0)
    assert job.run != here.run
