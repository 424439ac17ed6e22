"""Gradient clipping in front of any PyTorch optimizer."""

from torch_clip.attach import clip
from torch_clip.chain import Chain
from torch_clip.clipping import Clipping, NonFiniteGradientError, Telemetry, Transform
from torch_clip.methods import CLIPPINGS
from torch_clip.optimizers import ClippedAdam, ClippedAdamW, ClippedSGD, ClippedSSTM
from torch_clip.spike_guard import SpikeError

__all__ = [
    "CLIPPINGS",
    "Chain",
    "ClippedAdam",
    "ClippedAdamW",
    "ClippedSGD",
    "ClippedSSTM",
    "Clipping",
    "NonFiniteGradientError",
    "SpikeError",
    "Telemetry",
    "Transform",
    "clip",
]
