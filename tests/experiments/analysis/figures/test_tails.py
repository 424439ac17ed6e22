"""Pictures of tails show what their tables say, and the tables what the records say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.analysis.figures.tails import KINDS, SAMPLES, Histogram, draw
from experiments.analysis.render import read_table, render
from experiments.errors import UserError
from torch_clip.tails import compare_lognormal, hill

N = 1500
PANELS = list(SAMPLES.values())


@pytest.fixture(scope="module")
def records() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    heavy = rng.pareto(1.5, N) + 1
    light = rng.standard_normal(N)
    return pd.DataFrame({"grad_norm": 3 + heavy, "noise_norm": heavy, "noise_projection": light})


@pytest.mark.parametrize("name", KINDS)
def test_a_panel_for_each_sample_with_axes_that_are_named(records, name):
    figure, table = draw(name, records, "title")
    assert isinstance(figure, Figure)
    assert list(table["panel"].unique()) == PANELS
    assert set(table["n"]) == {N}
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        assert axes.get_ylabel()
        assert panel in axes.get_xlabel() + axes.get_ylabel()
    assert figure.get_suptitle() == "title"
    assert len(figure.legends[0].get_texts()) >= 2


@pytest.mark.parametrize("name", KINDS)
def test_a_table_from_csv_draws_the_same_picture(records, name):
    kind = KINDS[name](title="title")
    csv = kind.table(records).to_csv(index=False).encode()
    assert render(kind, csv, "caption") == render(kind, csv, "caption")
    pd.testing.assert_frame_equal(read_table(csv), kind.table(records), check_dtype=False, rtol=1e-15)


@pytest.mark.parametrize("name", ["survival", "hill", "qq"])
def test_all_that_is_drawn_is_in_the_table(records, name):
    figure, table = draw(name, records, "")
    numbers = table.select_dtypes("number").to_numpy()
    for axes in figure.axes:
        for line in axes.lines:
            if len(line.get_xdata()) > 2:  # the limit at 2 is no data
                assert np.isin(line.get_xydata(), numbers).all()


def test_bars_are_densities_and_what_is_beyond_is_counted(records):
    figure, table = draw("histogram", records, "")
    for axes, (panel, column) in zip(figure.axes, zip(PANELS, SAMPLES, strict=True), strict=True):
        bars = table[(table["panel"] == panel) & (table["kind"] == "bar")]
        assert [patch.get_height() for patch in axes.patches] == bars["y"].tolist()
        values = records[column]
        first, last = bars["x"].iloc[0], bars["x"].iloc[-1] + bars["width"].iloc[-1]
        beyond = ((values < first) | (values > last + 1e-9)).sum()
        assert set(bars["beyond"]) == {beyond}
        assert (bars["y"] * bars["width"]).sum() == pytest.approx(1 - beyond / N)
        assert (f"{beyond} beyond the axis" in axes.get_title("right")) == (beyond > 0)
        normal = table[(table["panel"] == panel) & (table["kind"] == "normal")]
        top = normal["y"].max()
        assert top == pytest.approx(1 / (values.std() * np.sqrt(2 * np.pi)), rel=0.01)
    assert (table.groupby("panel")["beyond"].first() > 0).tolist() == [True, False, True]


def test_the_survival_function_keeps_the_largest_and_its_fits_meet_it(records):
    _, table = draw("survival", records, "")
    values = np.sort(records["noise_norm"])[::-1]
    shown = table[table["panel"] == "norm of the noise"]
    points = shown[shown["kind"] == "sample"]
    assert points["x"].head(20).tolist() == values[:20].tolist()
    for x, y in zip(points["x"], points["y"], strict=True):
        assert y == pytest.approx((values >= x).mean())
    fit = compare_lognormal(values.copy(), 0.1)
    line = shown[shown["kind"] == "power law"]
    assert (line["x"].iloc[0], line["y"].iloc[0]) == pytest.approx((fit.x_min, 0.1))
    slope = np.diff(np.log(line["y"])) / np.diff(np.log(line["x"]))
    np.testing.assert_allclose(slope, -fit.alpha, rtol=1e-9)
    lognormal = table[(table["panel"] == PANELS[2]) & (table["kind"] == "lognormal")]
    assert lognormal["y"].iloc[0] == pytest.approx(0.1)
    assert (np.diff(lognormal["y"]) < 0).all()


def test_the_hill_plot_has_the_estimates_of_hill(records):
    _, table = draw("hill", records, "")
    row = table[(table["panel"] == "norm of the noise") & (table["k"] == 150)].iloc[0]
    expected = hill(records["noise_norm"].to_numpy(), 150)
    assert tuple(row[["alpha", "low", "high"]]) == pytest.approx(expected)
    assert row["share"] == 0.1


def test_of_a_run_the_gradient_norm_alone_is_drawn(records):
    table = Histogram(title="").table(records[["grad_norm"]].assign(step=1))
    assert list(table["panel"].unique()) == ["gradient norm"]
    assert len(Histogram(title="").draw(table).axes) == 1


@pytest.mark.parametrize("name", KINDS)
def test_samples_that_are_hard_to_draw(name):
    rng = np.random.default_rng(0)
    ties = np.repeat([1.0, 2.0, 3.0], [400, 150, 50])
    few = np.where(np.arange(600) < 60, rng.exponential(1, 600), 0)
    huge = 1e30 * (rng.pareto(0.3, 600) + 1)
    figure, _ = draw(name, pd.DataFrame({"grad_norm": ties, "noise_norm": few, "noise_projection": huge}), "")
    figure.draw_without_rendering()
    with pytest.raises(UserError, match="there is no tail to draw"):
        draw(name, pd.DataFrame({"grad_norm": np.ones(600)}), "")
    with pytest.raises(UserError, match="there is no tail to draw"):
        draw(name, pd.DataFrame({"step": np.ones(600)}), "")
