"""Config nodes to objects; what a constructor refuses is the user's to mend."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.errors import UserError


def construct(node: DictConfig, what: str, model: nn.Module | None = None) -> Any:
    """Instantiate a config node; one with ``_partial_`` gives a function of what else its constructor takes.

    Args:
        node: of the config.
        what: the group that it is of.
        model: for each part that takes one and is given none, such as a clipping of rows, which finds the
            filters of transposed convolutions by it.

    Raises:
        UserError: the constructor refuses its settings, now or when the function is called.
    """
    try:
        made = instantiate(node if model is None else _with_model(node, model))
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        settings = {name: value for name, value in node.items() if not str(name).startswith("_")}
        raise UserError(f"{what}: {_one_line(cause)}{_given(settings)}") from None
    return functools.partial(_call, made, what) if isinstance(made, functools.partial) else made


def _with_model(node: DictConfig, model: nn.Module) -> DictConfig:
    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(part) for part in node]
        if not isinstance(node, dict):
            return node
        filled = {key: walk(part) for key, part in node.items()}
        return {"model": model, **filled} if _takes_model(node.get("_target_")) else filled

    return OmegaConf.create(walk(OmegaConf.to_container(node)), flags={"allow_objects": True})


def _takes_model(target: Any) -> bool:
    try:
        return "model" in inspect.signature(pkgutil.resolve_name(target)).parameters
    except Exception:  # instantiating says what is wrong with it
        return False


def _call(made: functools.partial, what: str, **objects: Any) -> Any:
    try:
        return made(**objects)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{what}: {_one_line(error)}{_given(made.keywords)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _given(settings: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"; given {told}" if told else ""
