"""``clipbench figures`` from the command line, with one small figure of real runs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from experiments import cli
from experiments.analysis.figures.plan import find_plans

SWEEP = "task=quadratic clipping=no_clip,norm seed=0,1 max_steps=6 eval_every=3 quiet=true device=cpu"
YAML = f"""\
# the made-up runs
experiment: adhoc
runs:
  clipping: [no_clip, norm]
figure:
  _target_: experiments.analysis.figures.curves.Curves
  title: Tiny
  panels:
    train/loss: loss
sweeps:
  - {SWEEP}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Results with the runs of the figure."""
    folder = tmp_path_factory.mktemp("made")
    sweep = ["run", "-m", *shlex.split(SWEEP), "keep=none", f"results_dir={folder}"]
    assert cli._dispatch(sweep) == 0
    return folder


@pytest.fixture
def runs(made, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made / "runs", tmp_path / "results" / "runs")).parent


@pytest.fixture
def clipbench(tmp_path, monkeypatch, capsys):
    """``clipbench`` with what is typed after it, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(YAML)
    monkeypatch.setattr(
        "experiments.analysis.figures.plan.find_plans", lambda _, names: find_plans(folder, names)
    )

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli._dispatch(list(argv))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_draw_and_check(clipbench, runs):
    assert clipbench("figures", "--out", "out") == (0, "tiny: 4 runs, out/adhoc/tiny.png\n", "")
    assert sorted(path.name for path in Path("out/adhoc").iterdir()) == [
        *("tiny.csv", "tiny.json", "tiny.pdf", "tiny.png"),
    ]
    assert clipbench("figures", "--check", "--out", "out") == (0, "tiny: ok\n", "")
    assert clipbench("figures", "--check", "--runs", "--out", "out") == (0, "tiny: ok\n", "")


def test_check_names_a_missing_and_a_changed_run(clipbench, runs):
    clipbench("figures")
    gone, changed = sorted(runs.glob("runs/*/*/sgd-norm/*/seed=*"))
    shutil.rmtree(gone)
    summary = json.loads((changed / "summary.json").read_text())
    summary["final"]["val/loss"] = 7.0
    (changed / "summary.json").write_text(json.dumps(summary))
    code, out, _ = clipbench("figures", "--check", "--runs")
    assert code == 1
    lines = out.splitlines()
    assert all(line.startswith("tiny: FAILED: ") for line in lines)
    assert f"run {gone.relative_to(runs / 'runs').as_posix()} is missing" in lines[0]
    assert f"run {changed.relative_to(runs / 'runs').as_posix()} has changed" in lines[1]
    assert clipbench("figures", "--check") == (0, "tiny: ok\n", "")  # which asks for no runs


def test_check_fails_on_a_changed_csv(clipbench, runs):
    clipbench("figures")
    csv = Path("results/adhoc/tiny.csv")
    csv.write_text(csv.read_text().replace("line,", "line ,", 1))
    code, out, _ = clipbench("figures", "--check", "tiny")
    assert code == 1
    assert "tiny.csv is not the file that was drawn" in out


def test_check_says_where_pictures_are_not_compared(clipbench, runs):
    clipbench("figures")
    path = Path("results/adhoc/tiny.json")
    sidecar = json.loads(path.read_text())
    sidecar["versions"]["matplotlib"] = "3.0"
    path.write_text(json.dumps(sidecar))
    code, out, _ = clipbench("figures", "--check")
    assert code == 0
    assert out.startswith("tiny: data ok, picture not compared: matplotlib is ")


@pytest.mark.parametrize("argv", [[], ["tiny"], ["--runs"]])
def test_check_fails_on_a_figure_without_files(clipbench, runs, argv):
    told = "tiny: FAILED: not published in results/adhoc; clipbench figures tiny draws it\n"
    assert clipbench("figures", "--check", *argv) == (1, told, "")


@pytest.mark.parametrize("argv", [[], ["--runs"]])
@pytest.mark.parametrize(
    ("suffix", "content", "told"),
    [("csv", "", "holds no table"), ("csv", None, "is missing"), ("json", "{", "is no JSON")],
)
def test_check_goes_on_after_a_damaged_file(clipbench, runs, suffix, content, told, argv):
    Path("conf/another.yaml").write_text(YAML)
    assert clipbench("figures")[0] == 0
    damaged = Path(f"results/adhoc/another.{suffix}")
    if content is None:
        damaged.unlink()
    else:
        damaged.write_text(content)
    code, out, err = clipbench("figures", "--check", *argv)
    first, second = out.splitlines()
    assert (code, err) == (1, "")
    assert first.startswith(f"another: FAILED: {damaged} {told}")
    assert second == "tiny: ok"


def test_check_writes_nothing(clipbench, runs):
    clipbench("figures")
    before = files(runs)
    clipbench("figures", "--check", "--runs")
    assert files(runs) == before


def test_without_runs(clipbench):
    told = "tiny: no runs of adhoc; clipbench figures tiny --run makes them\n"
    assert clipbench("figures") == (0, told, "")
    told = "clipbench: tiny: no finished runs of adhoc; clipbench figures tiny --run makes them\n"
    assert clipbench("figures", "tiny") == (2, "", told)
    assert not Path("results").exists()


def test_one_figure_that_cannot_be_drawn_does_not_stop_the_others(clipbench, runs):
    Path("conf/another.yaml").write_text(YAML.replace("train/loss: loss", "val/mcc: MCC"))
    code, out, err = clipbench("figures")
    assert code == 2
    assert err == "clipbench: another: none of these runs has recorded val/mcc\n"
    assert "tiny: 4 runs" in out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["tinny"], "there is no figure 'tinny'; choose of tiny. Did you mean 'tiny'?"),
        (["--runs"], "--runs goes with --check"),
        (["--check", "--run"], "--check writes nothing: leave out --run"),
    ],
)
def test_bad_input(clipbench, argv, told):
    code, out, err = clipbench("figures", *argv)
    assert (code, out) == (2, "")
    assert told in err


def test_run_makes_what_is_missing_and_nothing_else(clipbench, runs, made):
    missing = next(iter(runs.glob("runs/*/*/sgd-norm/*/seed=1")))
    shutil.rmtree(missing)
    before = files(runs)
    code, out, err = clipbench("figures", "tiny", "--run")
    assert code == 0, err
    assert out.startswith(f"[1/1] clipbench run -m {SWEEP}\n")
    assert out.endswith("tiny: 4 runs, results/adhoc/tiny.png\n")
    after = files(runs)
    assert {path: after[path] for path in before} == before
    assert (missing / "metrics.parquet") in after
    assert clipbench("figures", "--check", "--runs") == (0, "tiny: ok\n", "")
    # It is the run that was there before, number by number.
    clipbench("figures", "--results-dir", str(made), "--out", "out")
    assert Path("out/adhoc/tiny.csv").read_bytes() == Path("results/adhoc/tiny.csv").read_bytes()


def test_run_passes_on_that_something_failed(clipbench, runs, monkeypatch):
    monkeypatch.setattr("experiments.commands.run.main", lambda argv: 1)
    code, out, _ = clipbench("figures", "--run")
    assert code == 1
    assert "tiny: 4 runs" in out
