"""Whether to clip this time: always, or at random with a probability that grows with the gradient norm."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from torch_clip.scalars import Number
from torch_clip.schedules import Setting, at, setting, shown

# SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MASK = (1 << 64) - 1


def uniform(seed: int, step: int | Tensor) -> Number:
    """The ``step``-th uniform number in [0, 1) of the stream of ``seed``.

    A function of a counter instead of a generator with hidden state: the draw is the same on every device
    and every rank, needs no host synchronisation, replays in a CUDA graph, and resumes from the step count.

    Args:
        seed: any integer.
        step: a Python integer, or an int64 tensor, whose arithmetic wraps to the same bits.
    """
    if isinstance(step, Tensor):
        z = step * _signed(_GAMMA) + _signed(seed + _GAMMA)
        for shift, factor in _MIX:
            z = (z ^ ((z >> shift) & (_MASK >> shift))) * _signed(factor)
        return ((z >> 11) & (_MASK >> 11)).double() * 2.0**-53
    z = seed + (step + 1) * _GAMMA & _MASK
    for shift, factor in _MIX:
        z = (z ^ (z >> shift)) * factor & _MASK
    return (z >> 11) * 2.0**-53


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


class Gate(ABC):
    """Decides, once for the whole step, whether the clipping is carried out."""

    @abstractmethod
    def fires(self, coef: Number, step: int | Tensor) -> bool | Tensor:
        """Whether to clip, given the clip coefficient, shape of ``coef``; one draw for all of its units."""


class Always(Gate):
    """Clips every time."""

    def fires(self, coef: Number, step: int | Tensor) -> bool | Tensor:
        return True

    def __repr__(self) -> str:
        return "Always()"


class RandomGate(Gate):
    r"""Clips with probability :math:`\beta^{\alpha^k}`, where alpha is the clip coefficient.

    Args:
        beta: in (0, 1], or a function of the step, see ``torch_clip.schedules``. 1 always clips.
        power: k; 1 is the linear, 2 the quadratic gate, which clips more often.
        seed: of the draws, one a step.
    """

    def __init__(self, beta: Setting, power: int, seed: int = 0) -> None:
        self.beta = setting(beta, "beta", lambda beta: 0 < beta <= 1, "in (0, 1]")
        self.power = power
        self.seed = int(seed)

    def probability(self, coef: Number, step: int | Tensor = 0) -> Number:
        return at(self.beta, step) ** (coef**self.power)

    def fires(self, coef: Number, step: int | Tensor) -> bool | Tensor:
        # Held back when the draw is not below; so a NaN fires, and propagates as it would without a gate.
        held = uniform(self.seed, step) >= self.probability(coef, step)
        return ~held if isinstance(held, Tensor) else not held

    def __repr__(self) -> str:
        return f"RandomGate(beta={shown(self.beta)}, power={self.power})"
