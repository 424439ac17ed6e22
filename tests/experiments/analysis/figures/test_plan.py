"""What a YAML of conf/figure may hold, and what it is told otherwise."""

import pytest

from experiments.analysis.figures.plan import find_plans, read_plan
from experiments.errors import UserError

GOOD = """\
experiment: grid
figure:
  _target_: experiments.analysis.figures.heatmap.HeatMap
  title: Grid
sweeps:
  - experiment=grid clipping=norm,no_clip
"""


@pytest.fixture
def plan(tmp_path):
    def read(text: str):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return read_plan(path)

    return read


def test_a_plan(plan):
    read = plan(GOOD)
    assert (read.name, read.experiment, read.experiments, read.runs) == ("grid", "grid", ["grid"], {})
    assert read.kind.title == "Grid"
    assert read.sweeps == ("experiment=grid clipping=norm,no_clip",)
    assert plan(GOOD + "runs: {experiment: [a, b]}\n").experiments == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("experiment: grid\n", ""), "grid.yaml lacks experiment"),
        (
            ("sweeps:", "sweep:"),
            "the key 'sweep'; it takes experiment, runs, tuned, figure, sweeps, note. Did you mean",
        ),
        (("HeatMap", "HeatMop"), "cannot use experiments.analysis.figures.heatmap.HeatMop"),
        (
            ("  title: Grid", "  title: Grid\n  facet: task"),
            "HeatMap has no setting 'facet'; it has title, x, y",
        ),
        (("  title: Grid\n", ""), "title"),
        (("  _target_: experiments.analysis.figures.heatmap.HeatMap\n", ""), "figure lacks _target_"),
        (("experiment=grid clipping", "grid clipping"), "a line of sweeps is KEY=VALUE"),
        (
            ("heatmap.HeatMap\n  title: Grid", "curves.Curves\n  title: Grid\n  panels: {}\n  x: time"),
            "x must be step or epoch, got 'time'",
        ),
    ],
)
def test_what_is_wrong_is_said(plan, change, told):
    assert change[0] in GOOD
    with pytest.raises(UserError, match=r"grid\.yaml") as error:
        plan(GOOD.replace(*change))
    assert told in str(error.value)


def test_names_of_figures(tmp_path):
    for name in ("a_map", "b_map"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    assert [plan.name for plan in find_plans(tmp_path, [])] == ["a_map", "b_map"]
    assert [plan.name for plan in find_plans(tmp_path, ["b_map"])] == ["b_map"]
    with pytest.raises(UserError, match=r"no figure 'b_mop'; choose of a_map, b_map\. Did you mean 'b_map'"):
        find_plans(tmp_path, ["b_mop"])
