"""One colour, line and marker for each clipping wherever it appears; settings of ours for all figures."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib.style

DPI = 160
RC = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.formatter.limits": (-3, 5),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "hatch.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.dpi": DPI,
    "pdf.fonttype": 42,  # outlines that stay text: to be searched, copied and edited
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside, and the picture depends on no matplotlibrc."""
    with matplotlib.style.context(["default", RC]):
        yield


Dashes = str | tuple[int, tuple[float, ...]]


class Mark(NamedTuple):
    """How a line is drawn."""

    color: str
    linestyle: Dashes
    marker: str


SOLID: Dashes = "-"
DASHED: Dashes = (0, (4, 1.5))
DOTTED: Dashes = (0, (1.2, 1.2))
BROKEN: Dashes = (0, (5, 1.2, 1.2, 1.2))

# Okabe and Ito's palette, which any colour vision tells apart, with three of Paul Tol's.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PINK = "#D55E00", "#E69F00", "#CC79A7"
TEAL, WINE, OLIVE = "#44AA99", "#882255", "#999933"

# The original's methods have a colour each; the others share one, and differ in line and marker.
MARKS = {
    "no_clip": Mark(BLACK, SOLID, "o"),
    "norm": Mark(BLUE, SOLID, "s"),
    "linear_rand_norm": Mark(SKY, DASHED, "^"),
    "quadratic_rand_norm": Mark(TEAL, DOTTED, "v"),
    "layer_wise": Mark(GREEN, SOLID, "D"),
    "coordinate_wise": Mark(PINK, SOLID, "P"),
    "auto_clip": Mark(VERMILION, SOLID, "X"),
    "linear_rand_autoclip": Mark(ORANGE, DASHED, "<"),
    "quadratic_rand_autoclip": Mark(WINE, DOTTED, ">"),
    "layer_wise_autoclip": Mark(OLIVE, SOLID, "d"),
    "zclip": Mark(VERMILION, BROKEN, "h"),
    "agc": Mark(GREEN, BROKEN, "p"),
    "adagc": Mark(OLIVE, BROKEN, "8"),
    "spam": Mark(PINK, BROKEN, "*"),
    "adaclip": Mark(PINK, DASHED, "^"),
    "adagn": Mark(TEAL, BROKEN, "v"),
    "stable_spam": Mark(WINE, BROKEN, "D"),
    "uclip": Mark(SKY, BROKEN, "s"),
    "smooth": Mark(BLUE, DASHED, "o"),
    "smooth_sqrt": Mark(BLUE, DOTTED, "d"),
    "normalized": Mark(ORANGE, BROKEN, "X"),
    "spike_guard": Mark(BLACK, BROKEN, "p"),
    "chain": Mark(BLACK, DASHED, "P"),
}
_ELSEWHERE = [Mark(color, DOTTED, marker) for color in (VERMILION, GREEN, OLIVE, SKY) for marker in "ohd*"]
_AGAIN = (SOLID, DASHED, DOTTED, BROKEN)
_AGAIN_MARKERS = "osDv^Xph"


def mark(clipping: str) -> Mark:
    """How a clipping is drawn: one from elsewhere by its name, whatever else is in the picture."""
    return MARKS.get(clipping) or _ELSEWHERE[zlib.crc32(clipping.encode()) % len(_ELSEWHERE)]


def marks(lines: Iterable[tuple[str, str]]) -> dict[str, Mark]:
    """How to draw lines, of which each is given by its name and its clipping.

    A second line of one clipping keeps the colour, and gets another stroke and marker.
    """
    drawn: dict[str, Mark] = {}
    seen: dict[str, int] = {}
    for line, clipping in dict.fromkeys(lines):
        first, again = mark(clipping), seen.get(clipping, 0)
        seen[clipping] = again + 1
        strokes = [stroke for stroke in _AGAIN if stroke != first.linestyle]
        markers = [marker for marker in _AGAIN_MARKERS if marker != first.marker]
        other = Mark(first.color, strokes[(again - 1) % len(strokes)], markers[(again - 1) % len(markers)])
        drawn[line] = other if again else first
    return drawn
