"""Published figures: the bytes are the same each time, and a check finds whatever is not what it was."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.analysis import publish
from experiments.analysis.figures.base import ended
from experiments.analysis.figures.cost import CostAnatomy
from experiments.analysis.figures.curves import Curves
from experiments.analysis.figures.heatmap import HeatMap
from experiments.analysis.figures.plan import Plan
from experiments.analysis.figures.target import TimesToTarget
from experiments.analysis.publish import Findings, Published, first_difference, make, runs_of
from experiments.analysis.render import read_table, render
from experiments.errors import UserError

CURVES = Curves(title="Matthews correlation", panels={"val/mcc": "MCC"})


def plan_of(kind=CURVES, **changes) -> Plan:
    defaults = {
        **{"name": "curves", "experiment": "made", "runs": {}, "tuned": {}, "figure": {"title": kind.title}},
        **{"sweeps": ("experiment=made clipping=no_clip,norm",), "note": "made-up data", "kind": kind},
    }
    return Plan(**{**defaults, **changes})


def publish_it(plan: Plan, results, out=None) -> Published:
    published = Published(plan, out or results)
    published.write(make(plan, *ended(runs_of(plan, results))))
    return published


@pytest.fixture
def runs(make_runs):
    return [*make_runs([0.5, 0.6, math.nan]), *make_runs([0.7, 0.8, 0.9], clipping="norm")]


@pytest.fixture
def published(runs, tmp_path) -> Published:
    return publish_it(plan_of(), tmp_path)


def edit(path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def edit_sidecar(published: Published, **changes) -> None:
    edit(published.paths["json"], lambda old: json.dumps(json.loads(old) | changes).encode())


def test_what_is_published(published, runs, tmp_path):
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        *("curves.png", "curves.pdf", "curves.csv", "curves.json"),
    }
    sidecar = published.sidecar()
    assert sidecar["command"] == "clipbench figures curves"
    assert sidecar["runs_made_by"] == ["clipbench run -m experiment=made clipping=no_clip,norm"]
    assert sidecar["seeds"] == "3 seeds"
    assert (sidecar["code"], sidecar["torch"]) == (["c0ffee"], ["2.15.0"])
    assert sidecar["device"] == "cpu, x86_64, 1 thread"
    assert sidecar["seconds"] == pytest.approx(sum(run.summary()["seconds"] for run in runs), abs=0.1)
    assert {"python", "torch-clip", "matplotlib", "freetype"} <= set(sidecar["versions"])
    assert len(sidecar["runs"]) == 6
    assert all(path.startswith("made/cola-mini/sgd-") for path in sidecar["runs"])
    assert sorted(content.split()[0] for content in sidecar["runs"].values()) == ["diverged", *["ok"] * 5]
    for part in (
        "cola (mini preset): made-up data",
        "3 seeds each",
        "6 runs, 1 diverged",
        "cpu, x86_64, 1 thread",
    ):
        assert part in sidecar["caption"]
    assert str(tmp_path) not in published.paths["json"].read_text()


def test_fresh_figures_pass(published, tmp_path):
    assert published.check().problems == []
    assert published.check(tmp_path).problems == []
    assert published.check(tmp_path).notes == []


def test_the_bytes_do_not_depend_on_the_process_or_the_time(published, tmp_path):
    # A process of its own, with other hashes, another time zone and another matplotlibrc.
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: yellow\nsavefig.dpi: 50\n")
    code = (
        "import sys, pathlib\n"
        "from experiments.analysis.figures.curves import Curves\n"
        "from experiments.analysis.render import render\n"
        f"kind = Curves(title={CURVES.title!r}, panels={CURVES.panels!r})\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for suffix, content in render(kind, (folder / 'curves.csv').read_bytes(), sys.argv[2]).items():\n"
        "    (folder / f'again.{suffix}').write_bytes(content)\n"
    )
    elsewhere = {"PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path)}
    folder = published.paths["csv"].parent
    argv = [sys.executable, "-c", code, str(folder), published.sidecar()["caption"]]
    subprocess.run(argv, check=True, env=os.environ | elsewhere)
    for suffix in ("png", "pdf"):
        assert (folder / f"again.{suffix}").read_bytes() == published.paths[suffix].read_bytes()


def test_the_last_digits_of_the_layout_do_not_show(published, monkeypatch):
    # As they come out of the solver in one process or another.
    place, draws = ConstrainedLayoutEngine.execute, np.random.default_rng(0)

    def otherwise(self, figure):
        place(self, figure)
        for axes in figure.axes:
            axes._set_position(axes.get_position(original=True).bounds + draws.uniform(-1e-12, 1e-12, 4))

    before = {suffix: published.paths[suffix].read_bytes() for suffix in ("png", "pdf")}
    csv, caption = published.paths["csv"].read_bytes(), published.sidecar()["caption"]
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", otherwise)
    assert render(CURVES, csv, caption) == before
    monkeypatch.setattr("experiments.analysis.render.PLACES", 15)
    assert render(CURVES, csv, caption) != before


@pytest.mark.parametrize("suffix", ["png", "pdf", "csv", "json"])
def test_a_missing_file(published, suffix):
    published.paths[suffix].unlink()
    assert published.check().problems == [f"{published.paths[suffix]} is missing"]


def test_no_file_is_left(published, tmp_path):
    shutil.rmtree(tmp_path / "made")
    told = f"not published in {tmp_path / 'made'}; clipbench figures curves draws it"
    assert published.check(tmp_path).problems == [told]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "curves.json is no JSON: Expecting value"),
        (b'{"command": "clipbench fig', "curves.json is no JSON: Unterminated string"),
        (b"\xff", "curves.json is no JSON: 'utf-8' codec can't decode"),
        (b"[]", "curves.json is no sidecar: it lacks files, drawn_as, caption, versions, runs, seconds"),
        (b'{"files": 3}', "curves.json is no sidecar: it lacks files, drawn_as"),
    ],
)
def test_a_sidecar_that_is_none(published, tmp_path, content, told):
    published.paths["json"].write_bytes(content)
    (problem,) = published.check(tmp_path).problems
    assert told in problem


def test_a_sidecar_that_vouches_for_nothing(published):
    edit_sidecar(published, files={}, drawn_as={}, versions={})
    problems = published.check().problems
    assert [problem.split(" is not the file that was drawn")[0] for problem in problems[:3]] == [
        str(published.paths[suffix]) for suffix in ("png", "pdf", "csv")
    ]
    assert "says another experiment, runs, tuned, figure, note than was drawn" in problems[3]


@pytest.mark.parametrize("content", [b"", b'facet,"line', b"\xff\xfe,\n"])
def test_a_csv_that_is_none(published, tmp_path, content):
    published.paths["csv"].write_bytes(content)
    (problem,) = published.check(tmp_path).problems
    assert problem.startswith(f"{published.paths['csv']} holds no table: ")


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_a_picture_with_another_byte(published, suffix, monkeypatch):
    edit(published.paths[suffix], lambda old: old[:-20] + bytes([old[-20] ^ 1]) + old[-19:])
    digest, redrawn = published.check().problems
    assert (
        digest
        == f"{published.paths[suffix]} is not the file that was drawn: its digest differs from the sidecar's"
    )
    assert redrawn == f"{published.paths[suffix]} is not what its CSV gives when it is drawn again"
    # Where it cannot be drawn again the digest still tells.
    monkeypatch.setattr(publish, "drawn_with", lambda: {"matplotlib": "0.1"})
    assert published.check().problems == [digest]


def test_a_picture_that_its_sidecar_vouches_for_is_drawn_again(published):
    edit(published.paths["png"], lambda old: old + b"more")
    digests = published.sidecar()["files"] | {"png": publish._sha256(published.paths["png"].read_bytes())}
    edit_sidecar(published, files=digests)
    assert published.check().problems == [
        f"{published.paths['png']} is not what its CSV gives when it is drawn again"
    ]


def test_another_number_in_the_csv(published, tmp_path):
    before = published.paths["csv"].read_bytes()
    edit(published.paths["csv"], lambda old: old.replace(b",40,0.79", b",40,0.81", 1))
    assert published.paths["csv"].read_bytes() != before
    told = "\n".join(published.check().problems)
    assert "curves.csv is not the file that was drawn" in told
    assert "curves.png is not what its CSV gives" in told
    assert "curves.pdf is not what its CSV gives" in told
    *of_files, of_runs = published.check(tmp_path).problems
    assert of_files == told.splitlines()
    assert "curves.csv is not what the runs give" in of_runs


def test_a_csv_that_cannot_be_drawn_is_a_problem_and_no_crash(published):
    edit(published.paths["csv"], lambda old: b"facet,line\n1,2\n")
    assert any("cannot be drawn" in problem for problem in published.check().problems)


def test_other_versions_of_what_draws_are_told_and_not_compared(published, monkeypatch):
    versions = published.sidecar()["versions"] | {"freetype": "2.6.1", "python": "3.99"}
    edit_sidecar(published, versions=versions)
    here = publish.drawn_with()["freetype"]
    told = f"picture not compared: freetype is {here} here and was 2.6.1"
    assert published.check() == Findings(problems=[], notes=[told])


def test_a_changed_plan(published, tmp_path):
    changed = Published(plan_of(runs={"clipping": "norm"}, figure={"title": "another"}), tmp_path)
    assert changed.check().problems == ["conf/figure/curves.yaml says another runs, figure than was drawn"]


def test_a_missing_run(published, runs, tmp_path):
    shutil.rmtree(runs[4].path)
    path = "/".join(runs[4].path.parts[-5:])
    missing, numbers = published.check(tmp_path).problems
    assert missing == f"run {path} is missing"
    assert "curves.csv is not what the runs give: " in numbers
    assert published.check().problems == []  # without runs nothing is known of it


def test_no_run_is_left(published, tmp_path):
    shutil.rmtree(tmp_path / "runs")
    assert published.check(tmp_path).problems == [
        "its 6 runs: no finished runs of made; clipbench figures curves --run makes them"
    ]


def test_a_changed_run(published, runs, make_run, tmp_path):
    make_run(0.85, clipping="norm", seed=1)  # in the place of 0.8
    changed, _ = published.check(tmp_path).problems
    assert changed.startswith(f"run {publish.path_of(runs[4])} has changed: ok ")


def test_a_run_whose_numbers_are_not_drawn_has_changed_all_the_same(runs, tmp_path):
    published = publish_it(plan_of(), tmp_path)
    records = runs[4].records()
    records.loc[3, "train/loss"] += 1e-6
    records.to_parquet(runs[4].path / "metrics.parquet", index=False)
    (changed,) = published.check(tmp_path).problems
    assert "has changed" in changed


def test_a_run_that_was_not_drawn(published, make_run, tmp_path):
    run = make_run(0.85, clipping="norm", seed=7)
    assert f"run {publish.path_of(run)} is there and was not drawn" in published.check(tmp_path).problems


TIMED = [CostAnatomy(title="times"), TimesToTarget(title="times", target=0.45)]


def make_again(make_run) -> None:
    """The runs of the second method, which take longer now."""
    time = {"data": 0.1, "forward": 1.0, "backward": 2.0, "clip+step": 1.5}
    for seed, final in enumerate([0.7, 0.8, 0.9]):
        make_run(final, clipping="norm", seed=seed, seconds=99.0, time=time)


@pytest.mark.parametrize("kind", TIMED)
def test_the_same_run_made_again_has_not_changed_and_its_times_are_not_compared(
    kind, runs, make_run, tmp_path
):
    curves, timed = publish_it(plan_of(), tmp_path), publish_it(plan_of(kind, name="times"), tmp_path)
    make_again(make_run)
    assert curves.check(tmp_path) == Findings([], [])
    told = "times not compared: the same runs were made again, and took others"
    assert timed.check(tmp_path) == Findings([], [told])


@pytest.mark.parametrize("kind", TIMED)
def test_times_that_the_very_same_runs_did_not_take(kind, runs, tmp_path):
    timed = publish_it(plan_of(kind, name="times"), tmp_path)
    column = "milliseconds" if isinstance(kind, CostAnatomy) else "time"
    table = read_table(timed.paths["csv"].read_bytes())
    table.loc[len(table) - 1, column] *= 2
    table.to_csv(timed.paths["csv"], index=False)
    assert any(
        f"is not what the runs give: {column} of row" in told for told in timed.check(tmp_path).problems
    )


def test_new_times_hide_no_other_number(runs, make_run, tmp_path):
    timed = publish_it(plan_of(TIMED[1], name="times"), tmp_path)
    make_again(make_run)
    before = timed.paths["csv"].read_bytes()
    edit(timed.paths["csv"], lambda old: old.replace(b",30.0,1,", b",20.0,1,", 1))
    assert timed.paths["csv"].read_bytes() != before
    assert any("is not what the runs give: time of row" in told for told in timed.check(tmp_path).problems)


def test_an_unfinished_run_is_told_of_and_not_drawn(runs, make_run, tmp_path):
    run = make_run(0.5, clipping="norm", seed=9)
    (run.path / "summary.json").unlink()
    edit(run.path / "status.json", lambda old: old.replace(b'"status": "ok"', b'"status": "running"'))
    made = make(plan_of(), *ended(runs_of(plan_of(), tmp_path)))
    assert made.unfinished == [f"{run.path}: killed"]
    assert "1 more not finished and not drawn" in made.caption
    assert len(made.runs) == 6
    elsewhere = plan_of(runs={"clipping": "no_clip"})
    assert make(elsewhere, *ended(runs_of(elsewhere, tmp_path))).unfinished == []


def test_presets_and_devices_share_no_figure(make_run, tmp_path):
    make_run(0.5)
    make_run(0.5, preset="paper", settings={"max_steps": 80})
    with pytest.raises(UserError, match="runs of preset mini and paper share no figure: select one"):
        make(plan_of(), *ended(runs_of(plan_of(), tmp_path)))
    one = plan_of(runs={"preset": "paper"})
    assert len(make(one, *ended(runs_of(one, tmp_path))).runs) == 1
    make_run(0.5, preset="paper", settings={"device_type": "cuda"})
    with pytest.raises(UserError, match="runs of device_type cpu and cuda share no figure"):
        make(one, *ended(runs_of(one, tmp_path)))


def test_runs_of_several_experiments(make_run, tmp_path):
    for experiment in ("one", "two", "three"):
        make_run(0.5, experiment=experiment, clipping=f"my_{experiment}")
    plan = plan_of(runs={"experiment": ["one", "two"]})
    made = make(plan, *ended(runs_of(plan, tmp_path)))
    assert sorted(path.split("/")[0] for path in made.runs) == ["one", "two"]


def test_numbers_and_text_come_back_from_csv_as_they_were():
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.lognormal(0, 30, 200), [math.inf, -math.inf, math.nan, 0.1 + 0.2, 5e-324]])
    texts = ["0.30", "nan", "None", "1e3", "NA", "", "-", "true", 'a "b", c']
    table = pd.DataFrame({"line": [texts[n % len(texts)] for n in range(len(numbers))], "value": numbers})
    back = read_table(table.to_csv(index=False).encode())
    assert back["line"].tolist() == table["line"].tolist()
    assert back["value"].to_numpy().tobytes() == numbers.tobytes()


def test_the_first_difference():
    table = pd.DataFrame({"line": ["a", "b"], "value": [1.0, math.inf]})
    assert first_difference(table, table.assign(value=[1 + 1e-12, math.inf])) == ""
    assert first_difference(table, table.assign(value=[1.0, 2.0])) == "value of row 3 is inf, now 2.0"
    assert first_difference(table, table.assign(line=["a", "c"])) == "line of row 3 is b, now c"
    assert first_difference(table, table[:1]) == "it has 2 rows, now there are 1"
    assert first_difference(table, table[["line"]]) == "it has the columns line, value, now they are line"


def test_diverged_runs_stay_in_a_published_map(make_runs, tmp_path):
    # FOB warns about what is missing and leaves it out, so that a map shows survivors only.
    make_runs([math.nan, math.nan], settings={"clipping.threshold": 1.0})
    make_runs([0.5, 0.5], settings={"clipping.threshold": 2.0})
    published = publish_it(plan_of(HeatMap(title="map"), name="map"), tmp_path)
    table = read_table(published.paths["csv"].read_bytes())
    assert table["value"].tolist() == [-math.inf, 0.5]
    assert published.check().problems == []
