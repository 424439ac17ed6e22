"""The picture of one run: what its axes hold."""

import math

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from experiments.analysis.draw import curves_figure, draw_curves
from experiments.analysis.style import MAX_EPOCH_LINES
from experiments.runs import Run

STEPS = 200
SUMMARY = {
    "task": "cola",
    "preset": "mini",
    "optimizer": "adamw",
    "clipping": "auto_clip",
    "seed": 3,
    "metric": "mcc",
    "final": {"val/mcc": 0.48},
    "best": {"step": 150, "value": 0.512},
    "clip_fraction": 0.25,
    "clip_unit": "steps",
    "steps": STEPS,
    "steps_per_second": 43.21,
}

pytestmark = pytest.mark.filterwarnings("error")


def step_records(**changes) -> list[dict]:
    """STEPS training records; a change is a function of the step."""
    defaults = {
        "epoch": lambda step: (step - 1) // 50,
        "train/loss": lambda step: 1 + 1 / step,
        "lr": lambda step: 0.001,
        "grad_norm": lambda step: 1 + (step % 4 == 0),
        "threshold": lambda step: 1.5,
        "clip_coef": lambda step: 0.75 if step % 4 == 0 else 1.0,
        "clipped": lambda step: float(step % 4 == 0),
    }
    columns = {**defaults, **changes}
    return [
        {"step": step, **{name: value(step) for name, value in columns.items()}}
        for step in range(1, STEPS + 1)
    ]


def evaluations(every: int = 50) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": (step - 1) // 50,
            "val/mcc": step / 300,
            "train/mcc": step / 250,
            "val/loss": 1.2,
        }
        for step in range(every, STEPS + 1, every)
    ]


@pytest.fixture
def make_run(tmp_path):
    def make(records: list[dict], status: str = "ok", config: dict | None = None, **summary) -> Run:
        names = dict(experiment="paper", task="cola", preset="mini", optimizer="adamw", clipping="auto_clip")
        run = Run.locate(tmp_path, **names, digest="0123456789ab", seed=3)
        run.start({"optimizer": {"lr": 0.001}} if config is None else config)
        run.append(sorted(records, key=lambda record: record["step"]))
        run.finish(status, {**SUMMARY, **summary})
        return run

    return make


def panels(run: Run) -> tuple:
    """The figure, drawn once so that lazy layout runs, and its axes."""
    figure = curves_figure(run)
    FigureCanvasAgg(figure).draw()
    return figure, *figure.axes


def line(axes, label: str):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found


def labels(axes) -> list[str]:
    legend = axes.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def vertical_lines(axes, style: str) -> list[float]:
    return [
        line.get_xdata()[0]
        for line in axes.lines
        if line.get_linestyle() == style and len(set(line.get_xdata())) == 1
    ]


def test_panels_hold_what_was_recorded(make_run):
    _, loss, metric, norm = panels(make_run(step_records() + evaluations()))
    raw = line(loss, "train")
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, STEPS + 1))
    np.testing.assert_array_equal(raw.get_ydata(), 1 + 1 / np.arange(1, STEPS + 1))
    np.testing.assert_array_equal(line(loss, "evaluation").get_xdata(), [50, 100, 150, 200])
    np.testing.assert_allclose(line(metric, "train").get_ydata(), [0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(line(metric, "evaluation").get_ydata(), np.array([50, 100, 150, 200]) / 300)
    assert (line(metric, "best").get_xdata(), line(metric, "best").get_ydata()) == ([150], [0.512])
    np.testing.assert_array_equal(line(norm, "gradient norm").get_ydata(), [1, 1, 1, 2] * (STEPS // 4))
    np.testing.assert_array_equal(line(norm, "threshold").get_ydata(), 1.5)
    assert norm.get_yscale() == "log"


def test_loss_is_large_on_the_left_and_the_norm_below(make_run):
    _, loss, metric, norm = panels(make_run(step_records() + evaluations()))
    boxes = [axes.get_position() for axes in (loss, metric, norm)]
    assert boxes[0].x1 < boxes[1].x0
    assert boxes[0].width > 1.4 * boxes[1].width
    assert boxes[2].y1 < boxes[0].y0
    assert boxes[2].width > 2 * boxes[1].width


def test_a_metric_that_is_the_loss_is_drawn_once_across_the_width(make_run):
    records = step_records() + [{"step": step, "val/loss": 1.2} for step in (100, 200)]
    for summary in ({"metric": "loss", "final": {"val/loss": 1.2}}, {"metric": None, "final": {}}):
        figure, loss, norm = panels(make_run(records, **summary, best={"step": 100, "value": 1.2}))
        assert labels(loss)[-2:] == ["evaluation", "best"]
        assert line(loss, "best").get_ydata() == [1.2]
        assert loss.get_position().width == pytest.approx(norm.get_position().width)
        assert "best loss 1.2 at step 100" in figure.get_suptitle()


def test_every_axis_is_named_and_every_panel_titled(make_run):
    for unit in ("steps", "elements"):
        _, *every = panels(make_run(step_records() + evaluations(), clip_unit=unit))
        for axes in every:
            assert axes.get_title(loc="left")
            assert axes.get_xlabel() == "step"
            assert axes.get_ylabel()


def test_titles_and_legends_cover_neither_data_nor_each_other(make_run):
    records = step_records(**{"train/loss": lambda step: math.nan if step > 190 else 1.0}) + evaluations()
    figure, *every = panels(make_run(records, status="diverged"))
    for axes in every:
        legend, title = axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1
        assert not legend.overlaps(title)
        for number in axes.texts:
            assert not number.get_window_extent().overlaps(title)
            assert not number.get_window_extent().overlaps(legend)
    assert figure._suptitle.get_window_extent().y0 >= legend.y1


def test_smoothing_is_stated(make_run):
    _, loss, *_ = panels(make_run(step_records(**{"train/loss": lambda step: 1.0 + 7 * (step == 100)})))
    smooth = line(loss, "train, mean of 7 steps")
    np.testing.assert_allclose(smooth.get_ydata()[[95, 96, 99, 102, 103]], [1, 2, 2, 2, 1])
    assert line(loss, "train").get_alpha() < 0.5


def test_smoothing_on_a_log_scale_is_a_median(make_run):
    spiked = step_records(**{"train/loss": lambda step: 1.0 + 1000 * (step == 100)})
    _, loss, *_ = panels(make_run(spiked))
    np.testing.assert_array_equal(line(loss, "train, median of 7 steps").get_ydata(), 1.0)
    _, loss, *_ = panels(make_run(spiked[1::2]))
    assert "train, median of 5 records" in labels(loss)


def test_clipped_steps_are_marked_and_only_those(make_run):
    # A random gate: half of the steps above the threshold are let through.
    records = step_records(clipped=lambda step: float(step % 8 == 0)) + evaluations()
    _, _, _, norm = panels(make_run(records))
    marks = line(norm, "clipped")
    np.testing.assert_array_equal(marks.get_xdata(), np.arange(8, STEPS + 1, 8))
    np.testing.assert_array_equal(marks.get_ydata(), 2)
    assert marks.get_linestyle() == "None"


def test_no_clip_has_neither_threshold_nor_marks(make_run):
    records = step_records(threshold=lambda step: math.inf, clipped=lambda step: 0.0)
    _, _, _, norm = panels(make_run(records, clip_fraction=0.0))
    assert labels(norm) == ["gradient norm"]


def test_a_warm_up_without_threshold_leaves_it_out(make_run):
    records = step_records(threshold=lambda step: math.inf if step <= 20 else 1.5)
    _, _, _, norm = panels(make_run(records))
    assert line(norm, "threshold").get_xdata()[0] == 21


@pytest.mark.parametrize(("unit", "share"), [("elements", 0.004), ("tensors", 0.3)])
def test_share_of_units_gets_its_own_band_in_percent(make_run, unit, share):
    records = step_records(clipped=lambda step: share) + evaluations()
    figure, _, _, norm, band = panels(make_run(records, clip_unit=unit, clip_fraction=share))
    assert "clipped" not in labels(norm)
    assert f"threshold per {unit[:-1]} (median)" in labels(norm)
    assert band.get_title(loc="left") == f"share of {unit} clipped"
    np.testing.assert_allclose(line(band, "mean of 7 steps").get_ydata(), share)
    assert band.get_ylim()[0] == 0
    assert all(text.get_text().endswith("%") for text in band.get_yticklabels())
    assert f"{100 * share:.3g}% of {unit} clipped" in figure.get_suptitle()


def test_shares_are_recognised_without_a_unit(make_run):
    run = make_run(step_records(clipped=lambda step: 0.3), clip_unit=None)
    assert len(curves_figure(run).axes) == 4


def test_title_says_what_and_how_it_ended(make_run):
    assert curves_figure(make_run(step_records() + evaluations())).get_suptitle().splitlines() == [
        "cola mini: adamw (lr 0.001) with auto_clip, seed 3",
        "ok | 200 steps | final mcc 0.48 | best mcc 0.512 at step 150 | 25% of steps clipped | 43.2 steps/s",
    ]


@pytest.mark.parametrize("config", [{}, {"optimizer": None}, {"optimizer": {"lr": "auto"}}])
def test_title_without_a_known_lr(make_run, config):
    assert "adamw with auto_clip" in curves_figure(make_run(step_records(), config=config)).get_suptitle()


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_diverged_run_ends_where_it_ends(make_run, last):
    records = step_records(
        **{
            "train/loss": lambda step: last if step > 150 else 10.0 ** max(0, step - 120),
            "grad_norm": lambda step: last if step > 150 else 1.0,
        }
    )
    figure, loss, metric, norm = panels(make_run(records, status="diverged"))
    assert line(loss, "train").get_xdata()[-1] == 150
    assert loss.get_yscale() == "log"
    for axes in (loss, metric, norm):
        assert line(axes, "diverged").get_xdata() == [151, 151]
    assert "diverged at step 151" in figure.get_suptitle()
    np.testing.assert_array_equal(line(norm, "norm not finite").get_xdata(), np.arange(151, STEPS + 1))


def test_diverged_by_a_huge_but_finite_loss(make_run):
    figure = curves_figure(make_run(step_records(), status="diverged"))
    assert "diverged at step 200" in figure.get_suptitle()


def test_skipped_steps_of_a_good_run_are_marked(make_run):
    records = step_records(grad_norm=lambda step: math.nan if step in (30, 31) else 1.0) + evaluations()
    figure, _, _, norm = panels(make_run(records))
    np.testing.assert_array_equal(line(norm, "norm not finite").get_xdata(), [30, 31])
    assert "diverged" not in figure.get_suptitle()


def test_epochs_are_marked_where_they_begin(make_run):
    _, *every = panels(make_run(step_records() + evaluations()))
    for axes in every:
        assert vertical_lines(axes, "--") == [51, 101, 151]
        assert [text.get_text() for text in axes.texts] == ["epoch 1", "2", "3"]


@pytest.mark.parametrize("per_epoch", [1, 3, 7, 16])
def test_many_epochs_are_thinned_evenly(make_run, per_epoch):
    records = step_records(epoch=lambda step: (step - 1) / per_epoch)  # a fraction, as some loops count
    _, loss, *_ = panels(make_run(records))
    marked = vertical_lines(loss, "--")
    assert MAX_EPOCH_LINES / 3 <= len(marked) <= MAX_EPOCH_LINES
    assert len(set(np.diff(marked))) <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"grad_norm": lambda step: 0.0, "train/loss": lambda step: 0.0},
        {"grad_norm": lambda step: float(step % 2), "threshold": lambda step: 0.0},
        {
            "grad_norm": lambda step: 10.0 ** (step * 1.58 - 10),
            "train/loss": lambda step: 10.0 ** (step * 1.58 - 10),
        },
        {"grad_norm": lambda step: math.inf, "train/loss": lambda step: math.nan},
        {"train/loss": lambda step: -1e308 if step % 2 else 1e308},
        {"train/loss": lambda step: None, "grad_norm": lambda step: None, "clipped": lambda step: None},
    ],
    ids=["zeros", "some zeros", "to overflow", "nothing finite", "both signs", "none"],
)
@pytest.mark.parametrize("status", ["ok", "diverged"])
def test_axes_survive_any_value(make_run, values, status):
    _, *every = panels(make_run(step_records(**values), status=status))
    for axes in every:
        assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()


@pytest.mark.parametrize(("status", "unit"), [("ok", "steps"), ("diverged", "elements")])
@pytest.mark.parametrize(
    "records",
    [[], [{"step": 1}], step_records()[:1], evaluations()[:1], step_records()[:5]],
    ids=["none", "empty", "one step", "one evaluation", "five"],
)
def test_few_records(make_run, records, status, unit):
    run = make_run(records, status=status, final={}, best=None, clip_unit=unit)
    _, loss, *_ = panels(run)
    if any("train/loss" in record for record in records):
        assert line(loss, "train").get_marker() == "o"
    elif not any("val/loss" in record for record in records):
        assert loss.texts[0].get_text() == "nothing recorded"


def test_a_run_that_never_finished_is_drawn_from_what_is_there(tmp_path):
    run = Run.locate(
        tmp_path,
        experiment="e",
        task="voc",
        preset="mini",
        optimizer="sgd",
        clipping="norm",
        digest="0",
        seed=0,
    )
    run.start({})
    run.append(step_records()[:50] + evaluations()[:1])
    figure, _, metric, _ = panels(run)
    assert figure.get_suptitle() == "voc mini: sgd with norm, seed 0\nkilled"
    assert metric.get_ylabel() == "mcc"


def test_the_picture_lands_whole_in_the_run_folder(make_run):
    before = dict(matplotlib.rcParams)
    run = make_run(step_records() + evaluations())
    assert draw_curves(run) == run.curves_path
    assert imread(run.curves_path).shape == (880, 1430, 4)
    assert not list(run.path.glob(".*.tmp"))
    assert dict(matplotlib.rcParams) == before
