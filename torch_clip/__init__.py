"""Gradient clipping in front of any PyTorch optimizer."""

from torch_clip.attach import clip
from torch_clip.clipping import Clipping, NonFiniteGradientError, Telemetry, Transform
from torch_clip.methods import CLIPPINGS
from torch_clip.optimizers import ClippedAdam, ClippedAdamW, ClippedSGD, ClippedSSTM

__all__ = [
    "CLIPPINGS",
    "ClippedAdam",
    "ClippedAdamW",
    "ClippedSGD",
    "ClippedSSTM",
    "Clipping",
    "NonFiniteGradientError",
    "Telemetry",
    "Transform",
    "clip",
]
