"""The config of a command line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments.training.presets import Presets, conf_dir


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """What ``clipbench run`` would run with these settings, on a machine without a CUDA device."""

    def compose_run(*settings: str) -> DictConfig:
        presets = Presets("mini", {})
        OmegaConf.register_new_resolver("default_preset", lambda task: presets.name(task)[0], replace=True)
        OmegaConf.register_new_resolver("preset_default", presets.value, replace=True)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("run", overrides=list(settings))

    return compose_run
