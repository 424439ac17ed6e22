"""Several optimizers side by side, each with a model of its own that starts from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torch_clip.restarter import Restarter


class OptimizerProperties:
    """An optimizer's class and settings.

    Args:
        optimizer_class: any torch optimizer.
        **kwargs: its settings, parameters apart.
    """

    def __init__(self, optimizer_class: type[Optimizer], **kwargs: Any) -> None:
        self.optimizer_class = optimizer_class
        self.optimizer_kwargs = kwargs

    @property
    def name(self) -> str:
        """Label of a figure: ``ClippedSGD; lr=0.01, momentum=0.9``."""
        settings = ", ".join(f"{name}={value}" for name, value in self.optimizer_kwargs.items())
        return f"{self.optimizer_class.__name__}; {settings}" if settings else self.optimizer_class.__name__


class ModelProperties:
    """A model's class and settings.

    Args:
        model_class: what builds the model.
        **kwargs: its settings.
    """

    def __init__(self, model_class: Callable[..., nn.Module], **kwargs: Any) -> None:
        self.model_class = model_class
        self.model_kwargs = kwargs

    def get_model(self) -> nn.Module:
        """A new model."""
        return self.model_class(**self.model_kwargs)


class RestartProperties:
    """A restarter's class and settings, see ``Restarter``."""

    def __init__(
        self,
        restart_class: type[Restarter],
        first_restart_steps_cnt: int = 100,
        restart_coeff: float = 1.5,
        max_steps_cnt: int = 5000,
    ) -> None:
        self.restart_class = restart_class
        self._kwargs = {
            "first_restart_steps_cnt": first_restart_steps_cnt,
            "restart_coeff": restart_coeff,
            "max_steps_cnt": max_steps_cnt,
        }

    def get_kwargs(self) -> dict[str, Any]:
        """Settings for ``restart_class``."""
        return dict(self._kwargs)


class OptimizersCollector:
    """A model and an optimizer for each of ``optimizers_properties``; all models start from the same weights.

    Args:
        model_properties: the model.
        optimizers_properties: the optimizers.
        start_point_random_seed: of the weights.
        history_random_seed: torch's global generator is seeded with it when all are built.
        bs_muls: a batch size multiplier for each optimizer, for the caller's loop; None is 1 for all.
        lr_decays: a learning rate decay for each optimizer, for the caller's loop; None is 1 for all.
    """

    def __init__(
        self,
        model_properties: ModelProperties,
        optimizers_properties: Sequence[OptimizerProperties],
        start_point_random_seed: int = 42,
        history_random_seed: int = 42,
        bs_muls: Sequence[float] | None = None,
        lr_decays: Sequence[float] | None = None,
    ) -> None:
        self.optimizers_properties = list(optimizers_properties)
        self.bs_muls = self._one_each("bs_muls", bs_muls)
        self.lr_decays = self._one_each("lr_decays", lr_decays)
        self._nets = []
        for _ in self.optimizers_properties:
            torch.manual_seed(start_point_random_seed)
            self._nets.append(model_properties.get_model().train())
        torch.manual_seed(history_random_seed)
        self._optimizers = [
            properties.optimizer_class(net.parameters(), **properties.optimizer_kwargs)
            for properties, net in zip(self.optimizers_properties, self._nets, strict=True)
        ]

    def get_names_optimizers(self) -> list[str]:
        """A label for each optimizer."""
        return [properties.name for properties in self.optimizers_properties]

    def get_optimizer_objects(self) -> list[Optimizer]:
        """The optimizers."""
        return self._optimizers

    def get_nets(self) -> list[nn.Module]:
        """The models."""
        return self._nets

    def _one_each(self, name: str, values: Sequence[float] | None) -> list[float]:
        count = len(self.optimizers_properties)
        if values is not None and len(values) != count:
            raise ValueError(f"{name} needs a value for each of {count} optimizers, got {len(values)}")
        return [1] * count if values is None else list(values)


class OptimizersCollectorWithRestarts(OptimizersCollector):
    """``OptimizersCollector`` with a restarter for each optimizer.

    Args:
        model_properties: the model.
        optimizers_properties: the optimizers.
        restart_properties: one for all optimizers, or one for each, None where there shall be none.
        start_point_random_seed: as in ``OptimizersCollector``.
        history_random_seed: as in ``OptimizersCollector``.
        bs_muls: as in ``OptimizersCollector``.
        lr_decays: as in ``OptimizersCollector``.
    """

    def __init__(
        self,
        model_properties: ModelProperties,
        optimizers_properties: Sequence[OptimizerProperties],
        restart_properties: RestartProperties | Sequence[RestartProperties | None],
        start_point_random_seed: int = 42,
        history_random_seed: int = 42,
        bs_muls: Sequence[float] | None = None,
        lr_decays: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            model_properties,
            optimizers_properties,
            start_point_random_seed,
            history_random_seed,
            bs_muls,
            lr_decays,
        )
        if isinstance(restart_properties, RestartProperties):
            restart_properties = [restart_properties] * len(self.optimizers_properties)
        restarts = self._one_each("restart_properties", restart_properties)
        self._restarters = [
            restart and restart.restart_class(optimizer_properties=properties, **restart.get_kwargs())
            for properties, restart in zip(self.optimizers_properties, restarts, strict=True)
        ]

    def get_restarters(self) -> list[Restarter | None]:
        """A restarter, or None, for each optimizer."""
        return self._restarters
