"""One config, composed by Hydra as ``clipbench run`` does, for commands that train nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.training.presets import Presets


def composed(name: str, given: Mapping[str, str], presets: Presets) -> tuple[dict[str, Any], dict[str, str]]:
    """The config ``conf/<name>.yaml`` with these settings, resolved, and the options chosen.

    Raises:
        UserError: a setting, option or value is not there.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from experiments.complaints import explain
    from experiments.training.presets import conf_dir, for_hydra

    presets.register()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose(name, overrides=for_hydra(given), return_hydra_config=True)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return OmegaConf.to_container(own, resolve=True), choices
    except (HydraException, OmegaConfBaseException) as error:
        raise presets.complaint or explain(error, dict(given), name) from None
