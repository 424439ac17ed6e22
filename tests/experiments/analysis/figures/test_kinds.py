"""Each kind of figure: what it makes of known runs, and that nothing of them is lost in the picture."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from experiments.analysis.compare import compare
from experiments.analysis.figures.base import ended, in_order, select
from experiments.analysis.figures.best_of import BestOf
from experiments.analysis.figures.cost import PARTS, CostAnatomy
from experiments.analysis.figures.curves import Curves, stretch_of
from experiments.analysis.figures.heatmap import HeatMap
from experiments.analysis.figures.norms import Norms
from experiments.analysis.figures.profile import BEYOND, PerformanceProfile
from experiments.analysis.figures.sensitivity import Sensitivity
from experiments.analysis.figures.target import TimesToTarget
from experiments.analysis.figures.three_panels import ThreePanels
from experiments.analysis.figures.verdicts import Verdicts
from experiments.analysis.marks import mark, styled
from experiments.analysis.render import read_table
from experiments.analysis.stats import expected_best_of, mean_interval
from experiments.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")


def table_of(kind, runs) -> pd.DataFrame:
    """The table, as it comes back from CSV."""
    return read_table(kind.table(ended(runs)[0]).to_csv(index=False).encode())


def drawn(kind, table: pd.DataFrame):
    with styled():
        figure = kind.draw(table)
        FigureCanvasAgg(figure).draw()
    return figure


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def grid_runs(make_runs):
    """Learning rate by threshold: at (0.1, 3) two of three seeds diverge, at (0.1, 1) one; no (0.3, 1)."""
    runs = []
    for lr, threshold in itertools.product((0.01, 0.1, 0.3), (1.0, 3.0)):
        finals = [lr * threshold * (1 + 0.1 * seed) for seed in range(3)]
        if (lr, threshold) == (0.3, 1.0):
            continue
        if lr == 0.1:
            finals[: 2 if threshold == 3 else 1] = [math.nan, math.inf][: 2 if threshold == 3 else 1]
        settings = {"optimizer.lr": lr, "clipping.threshold": threshold}
        runs += make_runs(finals, task="quadratic", clipping="norm", settings=settings)
    return runs


class TestHeatMap:
    def test_every_cell_is_in_table_and_picture(self, grid_runs):
        kind = HeatMap(title="grid")
        table = table_of(kind, grid_runs)
        cells = table.set_index(["row", "column"])
        assert len(cells) == 6
        assert cells.loc[("3", "0.01"), "value"] == pytest.approx(0.033)
        # FOB drops such cells with a warning.
        assert cells.loc[("3", "0.1"), "value"] == math.inf
        assert (cells.loc[("3", "0.1"), "lost"], cells.loc[("3", "0.1"), "kind"]) == (2, "diverged")
        # One of three is no majority: the median counts it as the worst.
        assert cells.loc[("1", "0.1"), "value"] == pytest.approx(0.1 * 1.2)
        assert cells.loc[("1", "0.3"), "seeds"] == 0

        figure = drawn(kind, table)
        axes = figure.axes[0]
        boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        assert len(boxes) == 6
        assert sum(bool(box.get_hatch()) for box in boxes) == 1
        told = [text.get_text() for text in axes.texts]
        assert "diverged\n2 of 3" in told
        assert "0.12\n1 of 3 diverged" in told
        assert "not run" in told
        assert "final loss, median over seeds\n(lower is better)" in texts(figure)

    def test_hatching_reaches_the_pixels(self, grid_runs):
        kind = HeatMap(title="grid")
        table = table_of(kind, grid_runs)
        with styled():
            pictures = []
            for shown in (table, table.assign(value=table["value"].replace(math.inf, 0.3))):
                canvas = FigureCanvasAgg(kind.draw(shown))
                canvas.draw()
                pictures.append(np.asarray(canvas.buffer_rgba()).astype(int))
        differing = np.abs(pictures[0] - pictures[1]).sum(axis=2) > 0
        assert 0.01 < differing.mean() < 0.3

    def test_what_is_far_beyond_leaves_the_colours_of_others_apart(self, make_run):
        finals = {0.1: 1.0, 0.2: 4.0, 0.3: 1e20}
        runs = [
            make_run(final, task="quadratic", settings={"optimizer.lr": lr, "clipping.threshold": 1.0})
            for lr, final in finals.items()
        ]
        for kind in (HeatMap(title="grid"), Sensitivity(title="lr")):
            table = table_of(kind, runs)
            assert table["value"].tolist() == list(finals.values())
            figure = drawn(kind, table)
        assert "what is above 1e+05 is drawn there" in figure.get_label()
        first, second, far = (
            drawn(HeatMap(title="grid"), table_of(HeatMap(title="grid"), runs)).axes[0].patches
        )
        assert np.abs(np.subtract(first.get_facecolor(), second.get_facecolor())).sum() > 0.1
        assert far.get_facecolor()[:3] == pytest.approx((0.267, 0.005, 0.329), abs=0.01)  # the darkest

    def test_all_diverged(self, make_runs):
        runs = make_runs([math.nan, math.inf], task="quadratic", settings={"clipping.threshold": 1.0})
        kind = HeatMap(title="grid")
        assert "diverged\n2 of 2" in texts(drawn(kind, table_of(kind, runs)))

    def test_a_failed_run_is_a_cell_too(self, make_run):
        runs = [make_run(0.1, task="quadratic", status="oom", settings={"clipping.threshold": 1.0})]
        kind = HeatMap(title="grid")
        assert "oom\n1 of 1" in texts(drawn(kind, table_of(kind, runs)))

    def test_higher_is_better_turns_the_colours(self, make_run):
        runs = [
            make_run(0.1 + lr, settings={"optimizer.lr": lr, "clipping.threshold": 1.0}) for lr in (0.1, 0.5)
        ]
        kind = HeatMap(title="grid")
        first, second = drawn(kind, table_of(kind, runs)).axes[0].patches[:2]
        assert sum(second.get_facecolor()[:2]) > sum(first.get_facecolor()[:2])

    def test_what_is_left_open_is_refused(self, make_run):
        runs = [make_run(0.1, settings={"optimizer.momentum": momentum}) for momentum in (0.0, 0.9)]
        with pytest.raises(UserError, match=r"two unlike runs.*They differ in optimizer\.momentum"):
            table_of(HeatMap(title="grid"), runs)


class TestSensitivity:
    def test_points_and_strip(self, grid_runs, make_runs):
        runs = [*grid_runs, *make_runs([0.5], task="quadratic", settings={"optimizer.lr": 0.1})]
        kind = Sensitivity(title="lr", best_over=["clipping.threshold"])
        table = table_of(kind, runs)
        points = table[table["line"] == "norm"].set_index("x")
        assert list(points.index) == [0.01, 0.1, 0.3]
        assert points.loc[0.01, "setting"] == "threshold=1"
        assert points.loc[0.1, ["value", "low", "high", "lost"]].tolist() == [
            *(pytest.approx(0.12), pytest.approx(0.11), math.inf, 1),
        ]
        figure = drawn(kind, table)
        strip, curves = figure.axes
        assert [text.get_text() for text in strip.texts] == ["1 of 3"]
        (marker,) = strip.lines
        assert marker.get_markerfacecolor() == "none"  # less than half
        assert strip.get_ylabel() == "diverged"
        assert curves.get_xscale() == "log"
        assert legend_of(figure) == ["no_clip", "norm"]

    def test_a_point_at_which_most_diverged_is_a_full_marker_and_no_point(self, grid_runs):
        kind = Sensitivity(title="lr", lines=["clipping.threshold"])
        figure = drawn(kind, table_of(kind, grid_runs))
        strip, curves = figure.axes
        full = [line for line in strip.lines if line.get_markerfacecolor() != "none"]
        assert len(strip.lines) == 2
        assert len(full) == 1
        assert sum(np.isnan(line.get_ydata()).sum() for line in curves.lines) == 1

    def test_an_infinite_threshold_and_a_method_without_one(self, make_run):
        thresholds = (0.1, 1.0, math.inf)
        runs = [make_run(0.5, clipping="norm", settings={"clipping.threshold": t}) for t in thresholds]
        runs.append(make_run(0.4))
        kind = Sensitivity(title="threshold", x="clipping.threshold", x_name="threshold")
        figure = drawn(kind, table_of(kind, runs))
        axes = figure.axes[1]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "1", "none"]
        across = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
        assert [line.get_ydata()[0] for line in across] == [0.4]


class TestCurves:
    def test_mean_interval_and_median_range(self, make_runs):
        runs = make_runs([0.5, 0.6, 0.9])
        kind = Curves(title="mcc", panels={"val/mcc": "MCC"})
        last = table_of(kind, runs).iloc[-1]
        assert last[["value", "low", "high"]].tolist() == pytest.approx(list(mean_interval([0.5, 0.6, 0.9])))
        assert last["x"] == 40
        kind = Curves(title="mcc", panels={"val/mcc": "MCC"}, centre="median", x="epoch")
        last = table_of(kind, runs).iloc[-1]
        assert last[["x", "value", "low", "high"]].tolist() == pytest.approx([3.9, 0.6, 0.5, 0.9])

    def test_a_diverged_run_is_drawn_to_its_end_and_counted(self, make_runs):
        runs = make_runs([0.5, math.nan, 0.7])
        kind = Curves(title="mcc", panels={"val/mcc": "MCC", "train/loss": "loss"})
        table = table_of(kind, runs)
        lost = table[(table["kind"] == "diverged") & (table["panel"] == "train/loss")]
        assert lost["seed"].unique().tolist() == [1]
        assert len(lost) == 40
        kept = table[(table["kind"] == "line") & (table["panel"] == "val/mcc")]
        assert kept["value"].iloc[-1] == pytest.approx(0.6)
        figure = drawn(kind, table)
        assert legend_of(figure) == ["no_clip (2 of 3 seeds)", "a run diverged"]
        crosses = [line for line in figure.axes[1].lines if line.get_marker() == "x"]
        assert [line.get_xdata()[0] for line in crosses] == [40]

    def test_long_runs_are_averaged_over_stretches_that_are_told(self, make_runs):
        runs = make_runs([0.5], clipping="norm")
        kind = Curves(title="loss", panels={"train/loss": "loss"}, points=10)
        table = table_of(kind, runs)
        assert table["x"].tolist() == [5, 10, 15, 20, 25, 30, 35, 40]
        assert table["value"].iloc[0] == pytest.approx(np.mean(2 / np.arange(1, 6)))
        assert "of each run the mean of every 5 steps" in drawn(kind, table).get_label()
        kind = Curves(title="loss", panels={"train/loss": "loss"}, points=10, stretches="max")
        assert table_of(kind, runs)["value"].iloc[0] == 2
        assert "largest of every 5 steps" in drawn(kind, table_of(kind, runs)).get_label()

    @pytest.mark.parametrize(
        ("last", "records", "stretch"), [(100, 100, None), (1000, 1000, 10), (1001, 1001, 20)]
    )
    def test_lengths_of_stretches(self, last, records, stretch):
        assert stretch_of(last, records, points=100) == stretch

    def test_shares_are_means_in_percent_and_few_elements_are_told_from_none(self, make_run):
        runs = []
        for clipping, shares in (
            ("no_clip", [0, 0, 0]),
            ("coordinate_wise", [0, 2e-5, 4e-5]),
            ("norm", [0, 1, 1]),
        ):
            for seed, share in enumerate(shares):
                run = make_run(0.5, clipping=clipping, seed=seed)
                records = run.records().assign(clipped=float(share))
                records.to_parquet(run.path / "metrics.parquet", index=False)
                runs.append(run)
        kind = Curves(title="", panels={"clipped": "share"}, shares=["clipped"], centre="median", points=10)
        table = table_of(kind, runs)
        assert table.groupby("line")["value"].agg(["min", "max"]).to_numpy() == pytest.approx(
            np.repeat([[2e-5], [0], [2 / 3]], 2, axis=1)
        )
        figure = drawn(kind, table)
        (axes,) = figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            *("0 %", "0.01 %", "0.1 %", "1 %", "10 %", "50 %", "100 %"),
        ]
        assert axes.get_ylabel() == "share, fourth-root scale"
        none, few, most = (axes.transData.transform((0, share))[1] for share in (0, 2e-5, 1))
        bottom, top = axes.get_window_extent().intervaly
        assert few - none > 0.05 * (top - bottom)
        assert bottom < none < most < top
        assert len(axes.collections) == 0  # no band
        assert "shares: mean over seeds, without band" in figure.get_label()

    def test_facets_and_colours(self, make_run):
        noises = ("student", "gaussian")
        runs = [
            make_run(0.5, clipping=clipping, settings={"task.noise": noise})
            for noise in noises
            for clipping in ("norm", "no_clip")
        ]
        labels = {"student": "Student's t", "gaussian": "Gaussian"}
        kind = Curves(title="", panels={"val/mcc": "MCC"}, facets="task.noise", labels=labels)
        figure = drawn(kind, table_of(kind, runs))
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["Student's t", "Gaussian"]
        for axes in figure.axes:
            assert [line.get_color() for line in axes.lines] == [mark("no_clip").color, mark("norm").color]

    def test_a_column_that_nobody_recorded(self, make_run):
        with pytest.raises(UserError, match="none of these runs has recorded val/mocc"):
            table_of(Curves(title="", panels={"val/mocc": "MCC"}), [make_run(0.5)])


class TestTimesToTarget:
    def test_who_never_got_there_is_drawn_where_it_was_last_seen(self, make_runs):
        runs = [*make_runs([1.0, 0.5, 0.4]), *make_runs([1.0, 1.0, math.nan], clipping="norm")]
        kind = TimesToTarget(title="time", target=0.5)
        table = table_of(kind, runs)
        steps = table[table["panel"] == "steps"]
        assert steps["time"].tolist() == [20, 40, 40, 20, 20, 40]
        assert steps["reached"].tolist() == [1, 1, 0, 1, 1, 0]
        assert steps["median"].tolist() == [40] * 3 + [20] * 3
        seconds = table[table["panel"] == "seconds"]
        np.testing.assert_allclose(seconds["time"], 0.1 * steps["time"])
        figure = drawn(kind, table)
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert names == ["no_clip (2 of 3)", "norm (2 of 3)"]
        hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
        assert [line.get_marker() for line in hollow] == [">", ">"]

    def test_nobody_reached_it(self, make_runs):
        kind = TimesToTarget(title="time", target=0.9)
        table = table_of(kind, make_runs([0.5, 0.6]))
        assert (table["median"] == math.inf).all()
        assert "no_clip (0 of 2)" in texts(drawn(kind, table))


def test_parts_of_a_step_add_to_the_whole(make_run):
    time = {"data": 0.1, "forward": 0.4, "backward": 0.8, "clip+step": 0.7}
    slower = time | {"clip+step": 0.7 + 40 * 0.005}  # 5 ms a step
    runs = [make_run(0.5, time=time), make_run(0.5, clipping="norm", time=slower)]
    kind = CostAnatomy(title="cost")
    table = table_of(kind, runs).pivot(index="line", columns="part", values="milliseconds")
    assert table.sum(axis=1)["no_clip"] == pytest.approx(1e3 * sum(time.values()) / 40)
    assert (table.loc["norm"] - table.loc["no_clip"]).to_dict() == pytest.approx(
        {**dict.fromkeys(PARTS, 0), "clip+step": 5}, abs=1e-9
    )
    figure = drawn(kind, table_of(kind, runs))
    assert "50 ms, 35%" in texts(figure)
    assert legend_of(figure) == list(PARTS)


class TestPerformanceProfile:
    def test_ratios_scores_and_places(self, make_runs):
        runs = [
            *make_runs([1.0, 1.0], task="cola"),  # reaches 0.5 at step 20
            *make_runs([0.6, 0.6], task="cola", clipping="norm"),  # at 40
            *make_runs([1.0, 1.0], task="voc", clipping="norm"),
            *make_runs([0.1, 0.1], task="voc"),  # never
        ]
        kind = PerformanceProfile(title="profile", targets={"cola": 0.5, "voc": 0.5})
        table = table_of(kind, runs)
        ratios = table.set_index(["line", "task"])["ratio"].to_dict()
        assert ratios == {
            **{("no_clip", "cola"): 1, ("no_clip", "voc"): math.inf},
            **{("norm", "cola"): 2, ("norm", "voc"): 1},
        }
        scores = table.groupby("line")["score"].first()
        assert scores["no_clip"] == pytest.approx(0.5)
        assert scores["norm"] == pytest.approx((1 + 2 / 3) / 2)
        figure = drawn(kind, table)
        assert legend_of(figure) == ["no_clip: 0.50", "norm: 0.83"]
        assert BEYOND in np.concatenate([line.get_xdata() for line in figure.axes[1].lines])
        assert "Targets: cola 0.5 (given), voc 0.5 (given)." in figure.get_label()
        steps, markers = figure.axes[0].lines[2:]
        assert steps.get_xydata().tolist() == [[1, 0.5], [2, 1], [4, 1]]
        assert markers.get_xydata().tolist() == [[1.75, 0.5], [2.75, 1], [3.75, 1]]

    def test_equal_profiles_are_drawn_where_they_are_and_seen_all(self, make_run):
        names = ["no_clip", "norm", "layer_wise", "coordinate_wise", "auto_clip"]
        runs = [make_run(1.0, task=task, clipping=name) for task in ("cola", "voc") for name in names]
        kind = PerformanceProfile(title="profile", targets={"cola": 0.5, "voc": 0.5})
        lines = drawn(kind, table_of(kind, runs)).axes[0].lines
        assert {y for line in lines for y in line.get_ydata()} == {1}
        marked = [x for line in lines[1::2] for x in line.get_xdata()]
        assert len(set(marked)) == len(marked) == 3 * len(names)

    def test_targets_are_those_of_the_comparison(self, make_runs):
        runs = [
            *make_runs([1.0, 0.7, 0.6], task="cola"),
            *make_runs([0.9, 0.9, 0.5], task="cola", clipping="norm"),
            *make_runs([0.8, 0.9, 0.3], task="voc"),
            *make_runs([1.0, 1.2, 0.9], task="voc", clipping="norm"),
        ]
        kind = PerformanceProfile(title="profile")
        table = table_of(kind, runs)
        across = next(table for table in compare(runs).tables if table.name == "across")
        assert table.groupby("line")["score"].first().to_dict() == {
            row["method"]: pytest.approx(row["profile"]) for row in across.rows
        }
        told = drawn(kind, table).get_label()
        assert "Targets, the median of no_clip unless given: cola 0.7, voc 0.8." in told
        kind = PerformanceProfile(title="profile", targets={"voc": 0.85})
        assert "cola 0.7, voc 0.85 (given)." in drawn(kind, table_of(kind, runs)).get_label()

    def test_a_task_without_target_or_a_method_not_on_all_tasks(self, make_run, make_runs):
        runs = [make_run(1.0), make_run(1.0, task="voc"), make_run(1.0, clipping="norm")]
        with pytest.raises(UserError, match="targets has none for voc, where there is no reference 'nrom'"):
            table_of(PerformanceProfile(title="", targets={"cola": 0.5}, reference="nrom"), runs)
        with pytest.raises(UserError, match=r"targets has vok; tasks are cola, voc\. Did you mean 'voc'\?"):
            table_of(PerformanceProfile(title="", targets={"vok": 0.5}), runs)
        with pytest.raises(UserError, match="for cola, where half the runs of no_clip diverged"):
            table_of(PerformanceProfile(title=""), make_runs([math.nan, math.nan]))
        with pytest.raises(UserError, match="norm has no runs on voc, which others have"):
            table_of(PerformanceProfile(title="", targets={"cola": 0.5, "voc": 0.5}), runs)


def test_best_of_k_and_the_default(make_runs):
    finals = {0.1: [0.5, 0.6, 0.7], 0.2: [0.9, 0.8, 0.8], 0.3: [math.nan, math.nan, 0.9]}
    runs = [
        run
        for lr, values in finals.items()
        for run in make_runs(values, clipping="norm", settings={"optimizer.lr": lr})
    ]
    kind = BestOf(title="tuning", default={"optimizer.lr": 0.1, "clipping.percentile": 0.75})
    table = table_of(kind, runs)
    # Of those that diverged the score of a model that learned nothing.
    expected = [expected_best_of([0.6, 0.8, 0.0], k) for k in (1, 2, 3)]
    assert table[table["kind"] == "best of"]["value"].tolist() == pytest.approx(expected)
    assert table[table["kind"] == "default"]["value"].tolist() == [0.6]
    figure = drawn(kind, table)
    assert legend_of(figure) == ["norm (3 tried)"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines][1] == [0.6]


def test_three_panels_are_the_comparison_and_come_back_from_csv(make_runs):
    runs = [*make_runs([0.5, math.nan, 0.7]), *make_runs([0.6, 0.6, 0.7], clipping="norm")]
    kind = ThreePanels(title="cola", labels={"no_clip": "SGD"})
    table = table_of(kind, runs)
    figure = drawn(kind, table)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.split(",")[0] for title in titles] == ["train loss", "train mcc", "val mcc"]
    assert legend_of(figure) == ["SGD (n = 3, 1 diverged)", "norm (n = 3)", "a run diverged"]
    assert "epoch 1" in texts(figure)
    assert set(table["panel"]) == {"train loss", "train mcc", "val mcc", "diverged", "epoch"}


def test_norms_of_all_runs(make_run):
    with pytest.raises(UserError, match=r"picture must be histogram, .* got 'histo'"):
        Norms(title="", picture="histo")
    rng = np.random.default_rng(0)
    runs = [make_run(0.5, seed=seed) for seed in range(2)]
    for run in runs:
        records = run.records().assign(grad_norm=lambda frame: rng.lognormal(size=len(frame)))
        records.to_parquet(run.path / "metrics.parquet", index=False)
    kind = Norms(title="norms")
    table = table_of(kind, runs)
    bars = table[table["kind"] == "bar"]
    assert len(bars) > 5
    drawn(kind, table)


def test_a_selection_that_leaves_nothing_names_what_is_there(make_run):
    results, _ = ended([make_run(0.5, clipping="norm"), make_run(0.5)])
    assert len(select(results, {"clipping": ["norm", "agc"], "optimizer.lr": 0.1})) == 1
    with pytest.raises(
        UserError, match=r"no run has clipping=narm; these have no_clip, norm\. Did you mean 'norm'"
    ):
        select(results, {"clipping": "narm"})
    with pytest.raises(UserError, match=r"no run has task\.noize=student; these have none"):
        select(results, {"task.noize": "student"})


class TestThreePanels:
    def test_another_metric(self, two_tasks):
        table = table_of(ThreePanels(title="loss", metric="loss"), two_tasks[:10])
        assert "val loss" in set(table["panel"])
        with pytest.raises(UserError, match="mcc"):
            ThreePanels(title="", metric="mc").table(ended(two_tasks[:10])[0])


class TestVerdicts:
    COLA = Verdicts(title="verdicts", reference="no_clip")

    def test_numbers_and_verdicts_are_those_of_compare(self, two_tasks):
        compared = compare(two_tasks)
        (rows,) = (table.rows for table in compared.tables if table.name == "tasks")
        table = table_of(self.COLA, two_tasks[:15])
        known = table[table["kind"] == "difference"].set_index("line")
        for row in rows:
            if row["task"] != "cola":
                continue
            assert known.loc[row["method"], "verdict"] == row["verdict"]
            if row["method"] == "norm":
                assert known.loc["norm", "value"] == pytest.approx(row["difference"])
                assert known.loc["norm", "low"] == pytest.approx(row["difference_low"])
                assert known.loc["norm", "p_holm"] == pytest.approx(row["p_holm"])
        assert (table["kind"] == "run").sum() == 15
        figure = drawn(self.COLA, table)
        assert "2 of 5 diverged" in texts(figure)
        assert "better" in texts(figure)
        _, differences = figure.axes
        (mean,) = [
            line for line in differences.lines if list(line.get_ydata()) == [1] and len(line.get_xdata()) == 1
        ]
        assert mean.get_xdata()[0] == pytest.approx(known.loc["norm", "value"])
        assert mean.get_markerfacecolor() == mark("norm").color  # filled: there is a verdict

    def test_losses_by_their_ratio(self, two_tasks):
        kind = Verdicts(title="loss", reference="auto_clip", labels={"quadratic": "noisy"})
        table = table_of(kind, two_tasks[15:])
        assert set(table["facet"]) == {"noisy"}
        ratio = table[(table["kind"] == "ratio") & (table["line"] == "norm")].iloc[0]
        assert 0 < ratio["low"] < ratio["value"] < ratio["high"] < 1
        _, differences = drawn(kind, table).axes
        assert differences.get_xscale() == "log"
        assert "ratio of loss to auto_clip (lower is better)" in differences.get_xlabel()

    def test_an_interval_that_reaches_below_0_goes_on_to_the_edge(self, make_runs):
        runs = [
            *make_runs([0.1, 0.4, 9.0], task="quadratic"),
            *make_runs([0.1], task="quadratic", clipping="norm"),
        ]
        kind = Verdicts(title="loss", reference="norm")
        table = table_of(kind, runs)
        mean = table[(table["kind"] == "mean") & (table["line"] == "no_clip")].iloc[0]
        assert mean["low"] < 0
        axes = drawn(kind, table).axes[0]
        assert axes.get_xscale() == "log"
        (whisker,) = [
            line for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
        ]
        assert list(whisker.get_xdata()) == pytest.approx([axes.get_xlim()[0], mean["high"]])

    def test_another_metric(self, two_tasks):
        table = table_of(Verdicts(title="loss", reference="no_clip", metric="loss"), two_tasks[:10])
        assert set(table["metric"]) == {"loss"}
        assert set(table.loc[table["kind"] == "run", "value"]) == {1.0}

    def test_a_reference_that_is_not_there(self, two_tasks):
        with pytest.raises(UserError, match=r"there is no reference 'no_clp'; these are .*mean 'no_clip'"):
            Verdicts(title="", reference="no_clp").table(ended(two_tasks[:10])[0])


def test_lines_stand_in_the_order_of_their_labels():
    labels = ["sgd no_clip", "adam no_clip", "sgd norm"]
    keys = [
        (task, *line.split())
        for task in ("voc", "cola")
        for line in ("adam no_clip", "sgd norm", "sgd no_clip")
    ]
    expected = [(task, *line.split()) for task in ("cola", "voc") for line in labels]
    assert in_order(keys, labels) == expected
    assert in_order([("norm",), ("no_clip",), ("b",)], ["b"]) == [("b",), ("no_clip",), ("norm",)]
