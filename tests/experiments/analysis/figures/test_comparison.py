"""The three-panel comparison: what it draws of known curves, and that its table holds all of it."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection

from experiments.analysis.figures.comparison import comparison_figure

STEPS, EVERY = 120, 30
pytestmark = pytest.mark.filterwarnings("error")


def run(method: str, seed: int, value: float, *, end: int = STEPS, metric: str = "mcc") -> pd.DataFrame:
    """Curves of a run: its loss is ``value`` throughout, its metric ``value`` / 10 more each time."""
    step = np.arange(1, end + 1)
    train = pd.DataFrame({"step": step, "epoch": (step - 1) / 40, "train/loss": value})
    at = np.arange(EVERY, end + 1, EVERY)
    metrics = {f"{split}/{metric}": value * at / EVERY / 10 for split in ("train", "val")}
    if metric == "loss":
        del metrics["train/loss"]
    evaluated = pd.DataFrame({"step": at, "epoch": (at - 1) / 40, "val/loss": 1.0, **metrics})
    told = {"method": method, "clipping": method.split()[0], "seed": seed}
    return pd.concat([train, evaluated], ignore_index=True).assign(
        **told, status="ok" if end == STEPS else "diverged"
    )


def drawn(*runs: pd.DataFrame, metric: str = "mcc", higher_is_better: bool = True):
    figure, table = comparison_figure(
        pd.concat(runs, ignore_index=True), metric=metric, higher_is_better=higher_is_better, title="cola"
    )
    FigureCanvasAgg(figure).draw()
    return figure, table


def part(table: pd.DataFrame, panel: str, method: str) -> pd.DataFrame:
    return table[(table["panel"] == panel) & (table["method"] == method)].set_index("step")


@pytest.fixture
def two_methods():
    values = {"no_clip": (1.0, 2.0, 6.0), "norm": (0.5, 0.7, 0.6)}
    return [run(method, seed, value) for method, of in values.items() for seed, value in enumerate(of)]


def test_panels_of_the_original(two_methods):
    figure, _ = drawn(*two_methods)
    loss, train, val = figure.axes
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["train loss, mean of 5 steps", "train mcc", "val mcc"]
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert boxes[0].height > 1.8 * boxes[1].height
    assert boxes[0].width > boxes[1].width
    assert boxes[1].y0 > boxes[2].y1  # train above val
    for axes in (loss, train, val):
        assert axes.get_xlabel() == "step"
        dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert dashed == [41, 81]  # where epochs 1 and 2 begin


def test_median_and_band_over_the_seeds(two_methods):
    _, table = drawn(*two_methods)
    loss = part(table, "train loss", "no_clip")
    assert (loss[["median", "low", "high"]] == [2.0, 1.0, 6.0]).all(axis=None)
    val = part(table, "val mcc", "norm")
    assert val.index.tolist() == [30, 60, 90, 120]
    assert val["median"].tolist() == pytest.approx([0.06, 0.12, 0.18, 0.24])
    assert val["low"].tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert val["high"].tolist() == pytest.approx([0.07, 0.14, 0.21, 0.28])
    assert (table["seeds"].dropna() == 3).all()


def test_nothing_is_drawn_that_is_not_in_the_table(two_methods):
    figure, table = drawn(*two_methods, run("no_clip", 3, 1.5, end=70))
    panels = ("train loss", "train mcc", "val mcc")
    for axes, panel in zip(figure.axes, panels, strict=True):
        bottom, top = axes.get_ylim()
        methods = table[table["panel"] == panel]["method"].unique()
        bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
        curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
        assert len(curves) == len(bands) == len(methods) == 2
        for line, band, method in zip(curves, bands, methods, strict=True):
            points = part(table, panel, method)
            np.testing.assert_array_equal(line.get_xdata(), points.index)
            finite = points["median"].where(np.isfinite(points["median"]))
            np.testing.assert_array_equal(line.get_ydata(), finite)
            corners = {tuple(corner) for corner in np.round(band.get_paths()[0].vertices, 9)}
            edges = points[["low", "high"]].clip(bottom, top)
            for edge in edges:
                assert set(zip(points.index, edges[edge].round(9), strict=True)) <= corners
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert (
        [cross.get_xdata()[0] for cross in crosses]
        == table[table["panel"] == "diverged"]["step"].tolist()
        == [70]
    )


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_after_its_end_a_diverged_run_counts_as_the_worst(higher_is_better):
    runs = [run("no_clip", seed, 1.0, end=end) for seed, end in enumerate((STEPS, 70, 100))]
    _, table = drawn(*runs, run("norm", 0, 2.0), higher_is_better=higher_is_better)
    loss = part(table, "train loss", "no_clip")
    assert loss.loc[70, "high"] == 1
    assert loss.loc[71, "high"] == math.inf
    assert loss.loc[100, "median"] == 1
    assert loss.loc[101, "median"] == math.inf  # of three, two are lost
    val = part(table, "val mcc", "no_clip")
    assert val.index.tolist() == [30, 60, 90, 120]
    worst, edge = (-math.inf, "low") if higher_is_better else (math.inf, "high")
    assert val[edge].tolist()[1:3] == [pytest.approx(0.2), worst]
    assert val["median"].tolist() == [pytest.approx(0.1), pytest.approx(0.2), pytest.approx(0.3), worst]
    assert (val["diverged"] == 2).all()


def test_a_method_that_never_got_to_an_evaluation_is_still_there():
    figure, table = drawn(run("no_clip", 0, 1.0, end=20), run("norm", 0, 1.0))
    assert (part(table, "val mcc", "no_clip")["median"] == -math.inf).all()
    assert "no_clip (n = 1, 1 diverged)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_legend_says_n_and_covers_no_panel(two_methods):
    figure, _ = drawn(*two_methods, run("norm threshold=0.3", 0, 1.0, end=60))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "no_clip (n = 3)",
        "norm (n = 3)",
        "norm threshold=0.3 (n = 1, 1 diverged)",
        "a run diverged",
    ]
    assert "median over n seeds" in legend.get_title().get_text()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1


def test_lines_are_told_apart(two_methods):
    many = [run(f"norm threshold={number}", 0, 1.0 + number) for number in range(4)]
    figure, _ = drawn(*two_methods, *many)
    lines = [line for line in figure.axes[1].lines if len(line.get_xdata()) > 2]
    looks = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in lines}
    assert len(looks) == len(lines) == 6


def test_a_metric_that_is_the_loss_has_two_panels():
    runs = [run("norm", seed, 1.0 + seed, metric="loss") for seed in range(3)]
    figure, table = drawn(*runs, metric="loss", higher_is_better=False)
    assert [axes.get_ylabel() for axes in figure.axes] == ["train loss", "val loss"]
    assert {"train loss", "val loss"} <= set(table["panel"])


def test_one_seed_has_no_band():
    figure, _ = drawn(run("norm", 0, 1.0))
    assert not any(isinstance(each, PolyCollection) for axes in figure.axes for each in axes.collections)


def test_losses_decades_apart_are_on_a_log_scale_and_smoothed_by_medians():
    figure, _ = drawn(run("no_clip", 0, 1e-3), run("norm", 0, 1.0))
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].get_ylabel() == "train loss (log scale)"
    assert "median of 5 steps" in figure.axes[0].get_title(loc="left")


def test_long_curves_are_thinned():
    step = np.arange(1, 10_001)
    train = pd.DataFrame(
        {"step": step, "epoch": 0.0, "train/loss": 1.0, "val/loss": np.nan, "val/mcc": np.nan}
    )
    last = pd.DataFrame({"step": [10_000], "epoch": 0.0, "val/loss": 1.0, "val/mcc": 0.5, "train/mcc": 0.5})
    told = {"method": "norm", "clipping": "norm", "seed": 0, "status": "ok"}
    figure, table = drawn(pd.concat([train, last], ignore_index=True).assign(**told))
    assert 300 < len(part(table, "train loss", "norm")) <= 400
    assert "mean of 333 steps" in figure.axes[0].get_title(loc="left")
