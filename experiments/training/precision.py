"""In which precision forward and backward run."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.amp import GradScaler

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast to a dtype, and for fp16 a scaler that keeps small gradients from vanishing.

    Args:
        name: one of ``DTYPES``.
        device: of the model.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype = DTYPES[name]
        self._device = device.type

    def autocast(self) -> AbstractContextManager:
        """For forward, of training and of evaluation."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def scaler(self) -> GradScaler:
        """Scales losses; does nothing where it need not."""
        return GradScaler(self._device, enabled=self._dtype == torch.float16)
