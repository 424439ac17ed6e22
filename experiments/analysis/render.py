"""A table drawn: the same bytes whenever it is, as long as what draws has the same versions."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import textwrap
import zlib
from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis.figures.base import TEXT, Kind
from experiments.analysis.marks import styled
from experiments.analysis.style import QUIET

PICTURES = ("png", "pdf")
# Without dates and versions, which would make each drawing another file.
METADATA = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Creator": None, "Producer": None}}
CHARACTERS_PER_INCH, LINE_HEIGHT = 19, 0.15  # of a caption
TITLE_CHARACTERS = 10  # per inch
PLACES = 6  # of a position, in parts of the figure: a thousandth of a pixel
# From 3.1 on pandas reads back the number that was written unasked.
EXACT = {} if pd.__version__ >= "3.1" else {"float_precision": "round_trip"}


def render(kind: Kind, csv: bytes, caption: str) -> dict[str, bytes]:
    """Draw a table: suffix -> the picture. The same bytes whenever the versions are the same."""
    pictures = {}
    with styled():
        for suffix in PICTURES:
            figure = _compose(kind, csv, caption)
            _picture(figure, suffix)  # in which the solver finds a place for everything
            _settle(figure)
            pictures[suffix] = _picture(figure, suffix)
    return pictures


def _compose(kind: Kind, csv: bytes, caption: str) -> Figure:
    figure = kind.draw(read_table(csv))
    figure.suptitle(textwrap.fill(kind.title, int(figure.get_figwidth() * TITLE_CHARACTERS)))
    lines = [line for line in (figure.get_label(), caption) if line]
    if lines:
        _add_below(figure, lines)
    return figure


def _add_below(figure: Figure, lines: Sequence[str]) -> None:
    """Make the figure higher by some lines of small text."""
    width = int(figure.get_figwidth() * CHARACTERS_PER_INCH)
    text = "\n".join(textwrap.fill(line, width) for line in lines)
    strip = LINE_HEIGHT * (text.count("\n") + 1.5)
    height = figure.get_figheight() + strip
    figure.set_figheight(height)
    figure.get_layout_engine().set(rect=(0, strip / height, 1, 1 - strip / height))
    figure.text(0.01, 0.25 * LINE_HEIGHT / height, text, va="bottom", size=7, color=QUIET, linespacing=1.4)


def _picture(figure: Figure, suffix: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=suffix, metadata=METADATA[suffix])
    return file.getvalue()


def _settle(figure: Figure) -> None:
    """Keep everything where it is, rounded.

    The solver's last digits differ from process to process, and with them an edge in a PNG or a -0 in a PDF.
    """
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position(_rounded(axes.get_position(original=True).bounds))
    for text in figure.texts:
        text.set_position(_rounded(text.get_position()))


def _rounded(place: Sequence[float]) -> list[float]:
    return [round(part, PLACES) for part in place]


def read_table(csv: bytes) -> pd.DataFrame:
    """A table as it was written; text stays text, and only what is empty is missing."""
    text = dict.fromkeys(TEXT, str)
    table = pd.read_csv(io.BytesIO(csv), dtype=text, keep_default_na=False, na_values=[""], **EXACT)
    names = [name for name in TEXT if name in table]
    return table.fillna(dict.fromkeys(names, ""))


def drawn_with() -> dict[str, str]:
    """What decides the bytes of a picture once its table is given."""
    return {
        "matplotlib": matplotlib.__version__,
        "freetype": matplotlib.ft2font.__freetype_version__,
        **{name: importlib.metadata.version(name) for name in ("pillow", "fonttools")},
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "machine": platform.machine(),
    }
