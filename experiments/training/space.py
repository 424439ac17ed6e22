"""What a search chooses from: the values of settings, in Hydra's own grammar.

``choice(a,b)``, ``a,b`` and ``range(1,5)`` are choices. ``interval(0.1,1)`` is every number between,
``int(interval(1,9))`` every whole number; ``tag(log,interval(1e-4,1e-1))`` is even in its logarithm, and the
tag ``or_inf`` adds infinity, such as a threshold that clips nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

LOG, OR_INF = "log", "or_inf"
INFINITE = 1 / 8
"""Share of the points that are infinite: exactly one in eight of Sobol's."""
EDGE = 0.05
"""Share of an interval that counts as its edge."""
FEWEST_WITH_EDGES = 3
"""Of two choices each is on an edge."""
DIGITS = 4
"""Of a value from an interval."""


class Dimension(NamedTuple):
    """The values of one setting: choices, or what lies between two numbers."""

    key: str
    choices: list[str] = []  # noqa: RUF012  never changed
    """None of them where it is an interval."""
    low: float = 0.0
    high: float = 0.0
    integer: bool = False
    log: bool = False
    or_inf: bool = False

    def at(self, place: float) -> str:
        """The value at a place in [0, 1), which all values share evenly."""
        if self.choices:
            return self.choices[int(place * len(self.choices))]
        if self.or_inf:
            if place >= 1 - INFINITE:
                return "inf"
            place /= 1 - INFINITE
        low, high = self.low, self.high + self.integer
        value = low * (high / low) ** place if self.log else low + (high - low) * place
        return self.text(value)

    def text(self, value: float) -> str:
        """A number of the interval as it is written on a command line: short, and not beyond an end."""
        if math.isinf(value):
            return "inf"
        short = math.floor(value) if self.integer else float(f"{value:.{DIGITS}g}")
        return f"{min(max(short, self.low), self.high)}"

    @property
    def has_infinity(self) -> bool:
        """Whether infinity is one of the values."""
        return self.or_inf or math.inf in map(_number, self.choices)

    def edge(self, value: str) -> str | None:
        """Say on which edge a value lies, where a better one may lie beyond; None if on none."""
        number = _number(value)
        if number is None or math.isinf(number):
            return None
        if self.choices:
            numbers = [_number(choice) for choice in self.choices]
            if None in numbers or len(numbers) < FEWEST_WITH_EDGES:
                return None
            ends = {min(numbers): "smallest", max(numbers): "largest"}
            return f"{self.key}={value} is the {ends[number]} of its choices" if number in ends else None
        low, high = (math.log(end) if self.log else end for end in (self.low, self.high))
        place = ((math.log(number) if self.log else number) - low) / (high - low)
        if EDGE < place < 1 - EDGE:
            return None
        end, which = (self.low, "lower") if place <= EDGE else (self.high, "upper")
        return f"{self.key}={value} is at the {which} end, {end:g}, of its interval"


def dimension(override: Override) -> Dimension:
    """The values of a setting that was given several.

    Raises:
        UserError: there is none between the ends of an interval, or not in its logarithm.
    """
    key = override.get_key_element()
    if not override.is_interval_sweep():
        return Dimension(key, list(override.sweep_string_iterator()))
    sweep = override.value()
    unknown = sweep.tags - {LOG, OR_INF}
    if unknown:
        raise UserError(
            f"{override.input_line}: an interval takes the tags {LOG} and {OR_INF}, got {unknown}"
        )
    low, high, log = sweep.start, sweep.end, LOG in sweep.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{override.input_line}: an interval is of two numbers, the smaller one first")
    if log and low <= 0:
        raise UserError(f"{override.input_line}: an interval that is even in its logarithm begins above 0")
    return Dimension(key, [], low, high, isinstance(low, int), log, OR_INF in sweep.tags)


def points(dimensions: list[Dimension], count: int, seed: int) -> list[dict[str, str]]:
    """Choose evenly spread points of a space, of which more begin with the same.

    Args:
        dimensions: of the space, one or more.
        count: of the points.
        seed: of their scrambling.
    """
    import numpy as np
    from scipy.stats.qmc import Sobol

    sobol = Sobol(len(dimensions), scramble=True, rng=np.random.default_rng(seed))
    places = sobol.random_base2(math.ceil(math.log2(count)))[:count]
    return [
        {one.key: one.at(float(at)) for one, at in zip(dimensions, place, strict=True)} for place in places
    ]


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
