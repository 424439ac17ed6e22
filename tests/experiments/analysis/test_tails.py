"""The report of a measurement of gradient norms."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments.analysis.figures.tails import KINDS
from experiments.analysis.tails import report
from experiments.runs import Run
from torch_clip.tails import examine

SUMMARY = {
    **{"task": "cola", "preset": "mini", "weights": "initial", "settings": "noise=other", "seed": 3},
    **{"checkpoint": None, "checkpoint_step": 0, "steps": 1500, "batch_size": 64, "not_finite": 0},
    **{"parameters": 66_098, "mean_grad_norm": 2.0},
}


def records(n: int = 1500) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    heavy = rng.pareto(1.5, n) + 1
    return pd.DataFrame(
        {
            "step": np.arange(1, n + 1),
            "grad_norm": 3 + heavy,
            "noise_norm": heavy,
            "noise_projection": rng.standard_normal(n),
        }
    )


@pytest.fixture
def measured(tmp_path):
    """A finished measurement with these records and what else its summary says."""

    def make(table: pd.DataFrame, **summary) -> Run:
        run = Run(tmp_path / "seed=3")
        with run.lock():
            run.start({})
            run.append(table.to_dict("records"))
            run.finish("ok", {**SUMMARY, **summary})
        return run

    return make


def test_words_numbers_and_pictures(measured):
    run = measured(records())
    text = report(run)
    lines = text.splitlines()
    title = "cola mini, noise=other: gradients at initial weights"
    assert lines[0] == f"{title}; n = 1,500 mini-batches of 64, 66,098 parameters, seed 3"
    assert lines[1].startswith("norm of the mean gradient 2, median norm of the noise 1.")
    expected = examine(records()["noise_norm"].to_numpy())
    assert expected.verdict == "heavy"
    place = lines.index("norm of the noise")
    assert lines[place + 1] == f"  heavy: {expected.reason}"
    assert "not heavy" in lines[lines.index("noise in one direction") + 1]
    assert {path.name for path in run.report_dir.iterdir()} == {
        *("tails.txt", "tails.json", "tails.csv"),
        *(f"{name}.{suffix}" for name in KINDS for suffix in ("png", "pdf", "csv")),
    }
    assert (run.report_dir / "tails.txt").read_text() == text

    found = json.loads((run.report_dir / "tails.json").read_text())["found"]["norm of the noise"]
    assert found["verdict"] == "heavy"
    assert found["hill"]["0.1"] == expected.hill[0.1]._asdict()
    table = pd.read_csv(run.report_dir / "tails.csv").set_index(["sample", "estimate"])
    row = table.loc[("norm of the noise", "Hill alpha, largest 10%")]
    assert tuple(row[["value", "low", "high"]]) == pytest.approx(expected.hill[0.1])
    assert ("noise in one direction", "block alpha") in table.index
    assert ("norm of the noise", "block alpha") not in table.index


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.setattr("experiments.analysis.tails.render", lambda *arguments: {"png": b"", "pdf": b""})


@pytest.mark.usefixtures("_no_pictures")
def test_a_report_that_is_there_is_not_made_again(measured):
    run = measured(records())
    text = report(run)
    stamps = {path: path.stat().st_mtime_ns for path in run.report_dir.iterdir()}
    assert report(run) == text
    assert {path: path.stat().st_mtime_ns for path in run.report_dir.iterdir()} == stamps
    (run.report_dir / "tails.txt").unlink()  # as when it was cut short: the words come last
    assert report(run) == text
    run.start({})
    assert not run.report_dir.exists()


@pytest.mark.usefixtures("_no_pictures")
def test_json_holds_no_infinities(measured):
    table = records()
    table["noise_norm"] = np.exp(np.random.default_rng(1).pareto(2, len(table)))  # its lognormal is the limit
    run = measured(table)
    report(run)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((run.report_dir / "tails.json").read_text(), parse_constant=refuse)["found"]
    assert found["norm of the noise"]["lognormal"]["mu"] is None
    assert found["norm of the noise"]["lognormal"]["p"] == 1


@pytest.mark.usefixtures("_no_pictures")
def test_what_is_not_finite_is_left_out_and_said(measured):
    table = records()
    table.loc[:2, ["grad_norm", "noise_norm", "noise_projection"]] = [math.inf, math.nan, math.nan]
    text = report(measured(table, not_finite=3))
    assert "n = 1,500 mini-batches of 64, 3 of them not finite and left out, " in text
    assert text.count("values      1497") == 3


def test_without_noise_there_is_no_tail_and_no_picture(measured):
    table = records().assign(grad_norm=2.5, noise_norm=0.0, noise_projection=0.0)
    run = measured(table)
    text = report(run)
    assert "gradient norm\n  no tail to look at: all lie between 2.5 and 2.5" in text
    assert {path.name for path in run.report_dir.iterdir()} == {"tails.txt", "tails.json", "tails.csv"}


@pytest.mark.usefixtures("_no_pictures")
def test_weights_of_a_run_are_named(measured):
    run = measured(records(), weights="sgd-norm-best", checkpoint="there", checkpoint_step=200, settings="")
    assert report(run).startswith("cola mini: gradients at sgd-norm-best, step 200; ")
