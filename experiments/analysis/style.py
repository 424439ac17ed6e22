"""How every figure looks: colours, headings, what stands above the axes; and how it is saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from experiments.runs import write_whole

# Okabe and Ito's palette: told apart with any colour vision. Their yellow is too pale for a line.
BLUE, ORANGE, GREEN, VERMILION, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
QUIET = "#777777"

MAX_EPOCH_LINES = 12
LOG_FROM_RATIO = 100
LARGEST = 1e200
"""The margins and ticks of an axis that reaches far beyond overflow."""
ABOVE_EPOCHS = 14  # points
TITLE = {"loc": "left", "fontweight": "bold", "fontsize": "medium", "pad": ABOVE_EPOCHS + 2}
DPI = 110


def is_wide(values: np.ndarray) -> bool:
    """Whether values need a log scale."""
    return len(values) > 0 and values.min() > 0 and values.max() > LOG_FROM_RATIO * values.min()


def window_for(count: int) -> int:
    """Odd length of a running mean over so many records."""
    return max(5, count // 30) | 1


def smooth(values: np.ndarray, window: int, how: str) -> np.ndarray:
    """Centred running mean or median."""
    rolling = pd.Series(values).rolling(window, center=True, min_periods=1)
    return getattr(rolling, how)().to_numpy()


def window_label(steps: np.ndarray, window: int, how: str) -> str:
    """``mean of 33 steps``; ``records`` where not every step has one."""
    return f"{how} of {window} {'steps' if (np.diff(steps) == 1).all() else 'records'}"


def epoch_starts(steps: np.ndarray, epochs: np.ndarray) -> list[tuple[float, int]]:
    """Return (step, epoch) where epochs begin, the first left out, thinned to MAX_EPOCH_LINES."""
    epochs = np.floor(epochs).astype(int)
    begins = np.flatnonzero(np.diff(epochs) > 0) + 1
    strides = (digit * 10**power for power in range(18) for digit in (1, 2, 5))
    every = next(stride for stride in strides if len(begins) <= MAX_EPOCH_LINES * stride)
    return [(steps[at], int(epochs[at])) for at in begins if epochs[at] % every == 0]


def mark_epochs(axes: Axes, starts: Iterable[tuple[float, int]]) -> None:
    """Draw a dashed line where an epoch begins, its number above."""
    for number, (step, epoch) in enumerate(starts):
        axes.axvline(step, color=QUIET, linestyle="--", linewidth=0.7, alpha=0.6, zorder=0)
        axes.text(
            step,
            1.01,
            str(epoch) if number else f"epoch {epoch}",
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=QUIET,
        )


def tidy(axes: Axes) -> None:
    """Whole steps on the x axis, a quiet grid, no frame."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.015)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, over the epoch numbers, where no curve can be."""
    above = axes.transAxes + ScaledTranslation(0, ABOVE_EPOCHS / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        bbox_transform=above,
        ncols=5,
        fontsize="small",
        columnspacing=1.2,
        handlelength=1.6,
        frameon=False,
        borderaxespad=0,
    )


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG or PDF, by the path's suffix; nothing in it says when."""
    form = path.suffix.removeprefix(".")
    with write_whole(path) as file:
        figure.savefig(file, format=form, dpi=DPI, metadata={"CreationDate": None} if form == "pdf" else None)
    return path
