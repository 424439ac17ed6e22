"""What Hydra complains about, in one message with the choices and the nearest name."""

from __future__ import annotations

import re

from experiments.errors import UserError, nearest

GROUPS = ("task", "preset", "optimizer", "scheduler", "clipping", "logger", "experiment")


# Launcher that is a plugin of Hydra's -> how to install it.
LAUNCHERS = {
    "joblib": "pip install '.[bench]' in the clone brings it",
    "submitit_local": "pip install '.[slurm]' in the clone brings it",
    "submitit_slurm": "pip install '.[slurm]' in the clone brings it",
    "ray": "pip install '.[ray]' in the clone brings it, into an environment of its own: it comes with an "
    "old cloudpickle, with which hydra/launcher=joblib does not work",
}


def explain(error: Exception, given: dict[str, str], command: str = "run") -> UserError:
    """Turn an error of Hydra's or OmegaConf's into ours.

    Args:
        error: raised while composing.
        given: settings of the command line.
        command: what they were given to, which its config is called after.
    """
    text = str(error).strip()
    if missing := re.search(r"Could not find '([^']+)/([^'/]*)'", text):
        group, option = missing.groups()
        options = sorted(getattr(error, "options", None) or ())
        if group.startswith("preset/"):
            from experiments.training.presets import no_preset

            return no_preset(group.removeprefix("preset/"), option, options)
        if group == "hydra/launcher" and option in LAUNCHERS:
            return UserError(f"hydra/launcher={option} is not installed: {LAUNCHERS[option]}")
        choices = f"; choose one of {', '.join(options)}" if options else ""
        return UserError(f"there is no {group} {option!r}{choices}.{nearest(option, options)}")
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return UserError(_unknown(unknown.group(1).split("@")[0], given, command))
    if override := getattr(error, "override", None):
        return UserError(f"cannot read {override!r}: put the value in quotes, KEY='\"VALUE\"'")
    if "Ambiguous value" in text:
        several = next((f"{key}={value}" for key, value in given.items() if "," in value), "it")
        if command != "run":
            return UserError(f"{several}: clipbench {command} takes one value of each")
        return UserError(f"{several}: several values make a sweep, which -m asks for: clipbench run -m ...")
    return UserError(" ".join(text.split()))


def _unknown(key: str, given: dict[str, str], command: str) -> str:
    """Say what there is in the place of a key that is not."""
    known = _known_keys(given, command)
    top = dict.fromkeys(name.split(".")[0] for name in known)
    node, _, leaf = key.rpartition(".")
    if not node:
        choices = list(dict.fromkeys((*(GROUPS if command == "run" else ()), *top)))
        return f"there is no key {key!r}; choose one of {', '.join(choices)}.{nearest(key, choices)}"
    inside = dict.fromkeys(
        name.removeprefix(f"{node}.").split(".")[0] for name in known if name.startswith(f"{node}.")
    )
    inside = [name for name in inside if not name.startswith("_")]
    if not inside:
        return f"there is no setting {key!r}.{nearest(key, known)}"
    chosen = f" of {given[node]}" if node in given else ""
    return (
        f"the chosen {node} has no setting {leaf!r}; the settings{chosen} are {', '.join(inside)}."
        f"{nearest(leaf, inside)}"
    )


def _known_keys(given: dict[str, str], command: str) -> list[str]:
    """Dotted names of all settings of the config with the chosen options."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from experiments.training.presets import conf_dir

    choosable = GROUPS if command == "run" else ("task",)
    groups = [f"{key}={value}" for key, value in given.items() if key in choosable and key != "preset"]
    single = [setting for setting in groups if "," not in setting]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_container(compose(command, overrides=single), resolve=False)

    def walk(node: object, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        below = [name for key, value in node.items() for name in walk(value, f"{prefix}.{key}".lstrip("."))]
        return [prefix, *below] if prefix else below

    return walk(config, "")
