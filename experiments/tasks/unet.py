"""A U-Net of segmentation-models-pytorch: settings are checked early, and weights are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from experiments.errors import UserError, nearest
from experiments.tasks import hub
from experiments.tasks.images import check_at_least
from experiments.tasks.needs import NOT_FETCHED, Need, reason

SCRATCH = "task.model.encoder_weights=null for an encoder from scratch"


class UnetMaker:
    """A U-Net of segmentation-models-pytorch.

    Args:
        encoder_name: of an encoder there.
        encoder_weights: name of pretrained weights, fetched from the hub; None for an encoder from scratch.
        encoder_depth: how often the encoder halves the picture.
        decoder_channels: of each step back up.
    """

    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_weights: str | None = None,
        encoder_depth: int = 5,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        check_at_least("model.encoder_depth", encoder_depth, 1)
        if not isinstance(decoder_channels, Sequence) or len(decoder_channels) != encoder_depth:
            raise UserError(
                f"model.decoder_channels must be {encoder_depth} numbers, as model.encoder_depth says, "
                f"got {decoder_channels!r}"
            )
        for channels in decoder_channels:
            check_at_least("model.decoder_channels", channels, 1)
        self._name = encoder_name
        self._weights = encoder_weights
        self._depth = encoder_depth
        self._channels = list(decoder_channels)

    def check(self, image_size: int) -> None:
        """Refuse what makes no U-Net for pictures of this size, or weights that are not to be had."""
        from segmentation_models_pytorch.encoders import encoders

        multiple = 2**self._depth
        if image_size % multiple:
            raise UserError(
                f"image_size must be a multiple of 2^encoder_depth = {multiple}, got {image_size}"
            )
        if self._name not in encoders and not str(self._name).startswith("tu-"):
            raise UserError(
                f"segmentation-models-pytorch has no encoder {self._name!r}."
                f"{nearest(str(self._name), encoders)}"
            )
        try:
            with torch.device("meta"):
                self._make(classes=2, weights=None)
        except Exception as error:  # wrong names and depths raise types of smp's and of timm's own
            raise UserError(f"model makes no U-Net: {reason(error)}") from error
        for need in self.needs():
            need.check()

    def needs(self) -> list[Need]:
        """The pretrained weights, on the hub."""
        from huggingface_hub import constants
        from segmentation_models_pytorch.encoders import encoders

        if self._weights is None:
            return []
        pretrained = encoders.get(self._name, {}).get("pretrained_settings", {})
        if self._weights not in pretrained:
            choices = ", ".join(["null", *pretrained])
            raise UserError(
                f"model.encoder_weights of {self._name} must be one of {choices}, got {self._weights!r}"
            )
        repo, revision = (pretrained[self._weights][key] for key in ("repo_id", "revision"))
        weights = hub.kept(repo, "model.safetensors", revision=revision)
        need = Need(
            f"the {self._weights} weights of {self._name}",
            weights.parent if weights else Path(constants.HF_HUB_CACHE),
            problem=None if weights else NOT_FETCHED,
            source=hub.address(repo),
            fetch=lambda: self._make(classes=2, weights=self._weights),
            give=SCRATCH,
        )
        return [need]

    def build(self, classes: int) -> nn.Module:
        """The model; what has no pretrained weights is drawn from torch's global generator."""
        try:
            return self._make(classes, self._weights)
        except Exception as error:  # network, cache, damaged files
            raise UserError(
                f"cannot use the {self._weights} weights of {self._name}: {reason(error)}. Ways on: "
                f"{SCRATCH}, or preset=mini, which needs none"
            ) from error

    def _make(self, classes: int, weights: str | None) -> nn.Module:
        from segmentation_models_pytorch import Unet

        return Unet(self._name, self._depth, weights, decoder_channels=self._channels, classes=classes)
