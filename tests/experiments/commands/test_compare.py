"""``clipbench compare``: what a user types, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil

import pytest

from experiments import cli
from experiments.runs import find_runs
from experiments.sweeps import find_sweeps

QUADRATIC = "run task=quadratic eval_every=20 device=cpu quiet=true keep=none"


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory):
    """A folder with real runs: the quadratic with two clippings, and another experiment."""
    folder, grid = tmp_path_factory.mktemp("compare"), "experiment=quadratic_grid"
    for settings in (
        f"-m clipping=no_clip,norm seed=0,1 {grid} max_steps=60 results_dir={folder}/results",
        f"clipping=norm seed=5 optimizer.lr=0.1 max_steps=60 results_dir={folder}/results",
        f"clipping=norm {grid} max_steps=80 results_dir={folder}/longer",
    ):
        assert cli._dispatch([*QUADRATIC.split(), *settings.split()]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere)


def clipbench(*argv: str) -> int:
    try:
        return cli._dispatch(["compare", *argv])
    except SystemExit as stop:  # argparse's way out
        return stop.code


def test_an_experiment(capsys):
    assert clipbench("--experiment", "quadratic_grid") == 0
    told = capsys.readouterr().out
    assert told.startswith("What was measured\n")
    assert "Task by task" in told
    lines = [line.split() for line in told.splitlines() if line.startswith("quadratic")]
    assert [line[3] for line in lines[:2]] == ["no_clip", "norm"]
    assert [line[4] for line in lines[:2]] == ["2", "2"]


def test_folders_however_they_are_named(capsys):
    assert clipbench("results/runs/quadratic_grid", "--format", "json") == 0
    whole = json.loads(capsys.readouterr().out)
    (task,) = os.listdir("results/runs/quadratic_grid")
    folders = [
        f"results/runs/quadratic_grid/{task}/{name}" for name in ("sgd-norm", "sgd-no_clip", "sgd-norm")
    ]
    assert clipbench(*folders, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == whole


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ("markdown", "### What was measured"),
        ("latex", r"\begin{table}"),
        ("csv", "# raw\ntask,"),
        ("json", "["),
    ],
)
def test_formats(form, begins, capsys):
    assert clipbench("--experiment", "quadratic_grid", "--format", form) == 0
    assert capsys.readouterr().out.startswith(begins)


def test_json_has_the_run_behind_every_number(capsys):
    assert clipbench("--experiment", "quadratic_grid", "--format", "json") == 0
    tables = json.loads(capsys.readouterr().out)
    assert [table["name"] for table in tables] == ["raw", "tasks", "runs"]
    runs = find_runs("results/runs/quadratic_grid")
    assert sorted(row["path"] for row in tables[-1]["rows"]) == sorted(str(run.path) for run in runs)


def test_an_experiments_name_and_a_sweeps_folder_are_runs_too(capsys):
    assert clipbench("--experiment", "quadratic_grid", "--format", "json") == 0
    whole = json.loads(capsys.readouterr().out)
    (sweep,) = find_sweeps("results")
    for folders in (["quadratic_grid"], [str(sweep.path)], [str(sweep.path), "quadratic_grid"]):
        assert clipbench(*folders, "--format", "json") == 0
        assert json.loads(capsys.readouterr().out) == whole


def test_a_sweep_tells_how_its_mixture_is_compared(elsewhere, capsys):
    folder = f"{elsewhere}/mixed"
    argv = f"-m clipping=no_clip,norm max_steps=20,40 results_dir={folder}"
    assert cli._dispatch([*QUADRATIC.split(), *argv.split()]) == 0
    told = capsys.readouterr().out
    assert "not compared: these runs differ in their max_steps" in told
    (line,) = [line for line in told.splitlines() if line.startswith("  clipbench compare ")]
    assert clipbench(*shlex.split(line)[2:]) == 0
    assert "max_steps=20" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.parquet", "summary.json", "status.json", "config.yaml"])
def test_a_damaged_run_is_named(name, tmp_path, capsys):
    shutil.copytree("results/runs/quadratic_grid", tmp_path / "runs/quadratic_grid")
    run = next(run for run in find_runs(tmp_path) if run.names["clipping"] == "norm")
    file = run.path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert cli._dispatch(["compare", "quadratic_grid", "--results-dir", str(tmp_path)]) == 2
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith(f"clipbench: the run {run.path} cannot be used: ")
    assert told.endswith("Delete that folder, and make the run again\n")
    assert told.count("\n") == 1


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_out_that_cannot_be_written(out, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert clipbench("--experiment", "quadratic_grid", "--out", str(tmp_path / out)) == 2
    printed, told = capsys.readouterr()
    assert printed == ""
    assert told.startswith(f"clipbench: --out: cannot write {tmp_path / out}: ")
    assert told.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_seeds_target_and_metric(capsys):
    options = ["--seeds", "1,5-7", "--target", "quadratic=5", "--metric", "loss", "--format", "json"]
    assert clipbench("--experiment", "quadratic_grid", *options) == 0
    raw, tasks, _ = json.loads(capsys.readouterr().out)
    assert [(row["seeds"], row["target"], row["reached"]) for row in raw["rows"]] == [(1, 5, 1), (1, 5, 1)]
    assert tasks["rows"][1]["pairs"] == 1


def test_out(capsys, tmp_path):
    assert clipbench("--experiment", "quadratic_grid", "--out", str(tmp_path / "out")) == 0
    written = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert sorted(written) == sorted(map(str, (tmp_path / "out").iterdir()))
    assert {"compare.md", "compare-runs.csv", "comparison.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_only_tables_of_what_was_tuned(capsys, tmp_path):
    out = tmp_path / "out"
    argv = ("--experiment", "quadratic_grid", "--tuned-at", "0", "--tables", "--out", str(out))
    assert clipbench(*argv) == 0
    assert "Settings tried" not in capsys.readouterr().out  # one of each method
    assert not list(out.glob("comparison*"))
    (row,) = [
        row for row in json.loads((out / "compare.json").read_text())[1]["rows"] if row["method"] == "norm"
    ]
    assert row["pairs"] == 1  # seed 1
    assert clipbench(*argv[:-2]) == 2
    assert "--tables goes with --out" in capsys.readouterr().err


REFUSED = {
    "": "name folders of runs, or an --experiment: results/runs has adhoc, quadratic_grid",
    "--experiment quadratic": "results/runs has adhoc, quadratic_grid. Did you mean 'quadratic_grid'",
    "--experiment x --results-dir nowhere": "no --experiment x: nowhere/runs has none",
    "--experiment adhoc results": "give folders or --experiment, not both",
    "nowhere": "no runs in nowhere, and no experiment of that name: results/runs has adhoc, quadratic_grid;",
    "quadratic_gird": "'clipbench run' makes one. Did you mean 'quadratic_grid'?",
    "results --format yaml": "--format must be one of text, markdown, latex, csv, json, got 'yaml'",
    "results --format jsn": "Did you mean 'json'?",
    "results --target low": "--target must be a number, or TASK=NUMBER,TASK=NUMBER, got 'low'",
    "results --target inf": "--target must be a number",
    "results --seeds 3-1": "--seeds must be whole numbers and ranges of them, as in 0-4,7, got '3-1'",
    "results --seeds a": "--seeds must be whole numbers",
    "results --tuned-at 1-": "--tuned-at must be whole numbers and ranges of them",
    "results/runs/quadratic_grid --tuned-at 7": "no setting has finished runs at all of the seeds 7",
    "results --seeds 9": "--seeds: no run has one of 9; there are 0, 1, 5",
    "results --reference nrom": "'nrom' is not the name of one method; choose one of",
    "results --metric mcc": "--metric: quadratic has no 'mcc'; choose one of loss",
    "results --target voc=1": "--target: there is no task 'voc' here; choose one of quadratic",
}


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_gets_one_message_and_writes_nothing(command, capsys, tmp_path):
    assert clipbench(*shlex.split(command), "--out", str(tmp_path / "out")) == 2
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith("clipbench: ")
    assert told.count("\n") == 1
    assert REFUSED[command] in told
    assert not (tmp_path / "out").exists()


def test_mixed_budgets_are_refused_and_allowed(capsys):
    assert clipbench("results/runs/quadratic_grid", "longer") == 2
    told = capsys.readouterr().err
    assert "these runs differ in their max_steps: " in told
    assert "60 in results/runs/" in told
    assert "80 in longer/runs/" in told
    assert clipbench("results/runs/quadratic_grid", "longer", "--allow-mixed") == 0
    assert "max_steps=80" in capsys.readouterr().out


def test_help(capsys):
    assert clipbench("--help") == 0
    told = capsys.readouterr().out
    assert "--allow-mixed" in told
    assert "of which --out writes a file each" in " ".join(told.split())
