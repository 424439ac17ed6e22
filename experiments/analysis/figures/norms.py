"""The distribution of gradient norms along training, in the pictures of ``clipbench tails``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis.figures.tails import KINDS, QQ, HillPlot, Histogram, Survival
from experiments.analysis.methods import Result
from experiments.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Gradient norms before clipping, of all steps of all runs together.

    Args:
        title: above the figure.
        picture: ``histogram``, ``survival``, ``hill`` or ``qq``.
    """

    title: str
    picture: str = "histogram"

    def __post_init__(self) -> None:
        if self.picture not in KINDS:
            raise UserError(
                f"picture must be {', '.join(KINDS)}, got {self.picture!r}.{nearest(self.picture, KINDS)}"
            )

    def table(self, results: Sequence[Result]) -> pd.DataFrame:
        """What is drawn of the norms."""
        records = [result.run.records()[["grad_norm"]] for result in results]
        return self._kind().table(pd.concat(records, ignore_index=True))

    def draw(self, table: pd.DataFrame) -> Figure:
        """The picture."""
        return self._kind().draw(table)

    def _kind(self) -> Histogram | Survival | HillPlot | QQ:
        return KINDS[self.picture](title=self.title)
