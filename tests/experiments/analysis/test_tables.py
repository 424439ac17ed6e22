"""The listing of runs, and grids of them."""

import csv
import hashlib
import json
import math

import pytest

from experiments.analysis.tables import (
    FORMATS,
    Table,
    format_table,
    grid,
    markdown_grid,
    runs_table,
    write_grid,
    write_tables,
)
from experiments.errors import UserError
from experiments.runs import Run, find_runs


@pytest.fixture
def results(tmp_path):
    """One finished, one killed and one running run; yields the results folder."""

    def locate(clipping: str, seed: int) -> Run:
        names = dict(experiment="paper", task="cola", preset="mini", optimizer="adamw", digest="0123456789ab")
        return Run.locate(tmp_path, **names, clipping=clipping, seed=seed)

    finished = locate("auto_clip", 9)
    finished.start({})
    finished.finish(
        "ok",
        {"metric": "loss", "higher_is_better": False, "best": {"step": 600, "value": 0.51234}, "steps": 1200},
    )
    killed = locate("auto_clip", 10)
    killed.start({})
    killed.append([{"step": 1}, {"step": 2}])
    running = locate("no_clip", 0)
    with running.lock():
        running.start({})
        yield tmp_path


def test_rows_say_what_a_run_is_and_how_far_it_came(results):
    finished, killed, running = runs_table(find_runs(results))
    assert finished == {
        "experiment": "paper",
        "task": "cola-mini",
        "optimizer": "adamw",
        "clipping": "auto_clip",
        "seed": 9,
        "status": "ok",
        "step": 1200,
        "metric": "loss",
        "better": "lower",
        "best": 0.51234,
        "digest": "0123456789ab",
        "path": str(results / "runs/paper/cola-mini/adamw-auto_clip/0123456789ab/seed=9"),
    }
    assert (killed["seed"], killed["status"], killed["step"], killed["best"]) == (10, "killed", 2, None)
    assert (running["clipping"], running["status"], running["step"]) == ("no_clip", "running", None)


def test_text_has_one_aligned_line_per_run(results):
    rows = runs_table(find_runs(results))
    header, *lines = format_table(rows).splitlines()
    assert len(lines) == len(rows)
    assert header.split() == list(rows[0])
    for key in ("clipping", "status", "metric", "path"):  # text begins where its header begins
        start = header.index(key)
        for line, row in zip(lines, rows, strict=True):
            assert line[start:].startswith(row[key] or "-")
    for key, texts in {
        "seed": ["9", "10", "0"],
        "step": ["1200", "2", "-"],
        "best": ["0.5123", "-", "-"],
    }.items():
        end = header.index(key) + len(key)  # numbers end where their header ends
        assert [line[:end].split()[-1] for line in lines] == texts
        assert all(line[end] == " " for line in lines)


def test_a_diverged_best_is_printed():
    assert format_table([{"best": float("nan")}, {"best": -2.0}]).split() == ["best", "nan", "-2"]


def test_summary_without_a_best_evaluation(tmp_path):
    run = Run(tmp_path / "a/b-c/d-e/f/seed=x")
    run.start({})
    run.finish("error", {"best": None})
    (row,) = runs_table([run])
    assert (row["best"], row["step"], row["seed"]) == (None, None, "x")


def test_no_runs():
    assert format_table(runs_table([])) == "no runs"


def finished(tmp_path, clipping, lr, seed, loss, status="ok", **settings):
    run = Run.locate(
        tmp_path,
        **dict(experiment="grid", task="quadratic", preset="mini", optimizer="sgd", clipping=clipping),
        digest=hashlib.sha1(f"{clipping}{lr}{settings}".encode()).hexdigest()[:12],
        seed=seed,
    )
    run.start({"optimizer": {"lr": lr}, "clipping": settings})
    final = {"val/loss": loss} if status == "ok" else {}
    run.finish(status, {"status": status, "metric": "loss", "higher_is_better": False, "final": final}, None)
    return run


def test_a_grid_has_medians_over_seeds_and_counts_diverged_runs(tmp_path):
    runs = [
        *(finished(tmp_path, "norm", 0.1, seed, seed + 1.0, threshold=2.0) for seed in range(3)),
        *(finished(tmp_path, "auto_clip", 0.1, seed, 5.0, percentile=0.5) for seed in range(3)),
        finished(tmp_path, "no_clip", 0.1, 0, 7.0),
        *(finished(tmp_path, "no_clip", 0.1, seed, math.nan, "diverged") for seed in (1, 2)),
        finished(tmp_path, "no_clip", 0.2, 0, 0.5),
    ]
    table = grid(runs, ["clipping", "clipping.threshold|clipping.percentile"], ["optimizer.lr"])
    assert table.loc[("norm", 2.0), 0.1] == 2.0
    assert table.loc[("auto_clip", 0.5), 0.1] == 5.0
    assert table.loc[("no_clip", "-"), 0.1] == math.inf
    assert table.loc[("no_clip", "-"), 0.2] == 0.5
    text = markdown_grid(table)
    assert "| clipping | clipping.threshold or clipping.percentile | optimizer.lr 0.1 |" in text
    assert "| no_clip | - | inf | 0.5 |" in text
    assert "| norm | 2.0 | 2 |  |" in text
    assert "final loss, median over seeds (1 to 3)" in text
    with pytest.raises(UserError, match=r"both of clipping=no_clip, experiment=grid: add what tells"):
        grid(runs, ["clipping"], ["experiment"])
    assert [path.name for path in write_grid(tmp_path / "out", table)] == ["grid.csv", "grid.md"]


@pytest.fixture
def table():
    rows = [
        {"name": "a_b & 50%", "value": 0.123456789, "times": math.inf},
        {"name": "c|d <e> #1 {x} ^~\\$", "value": None, "times": 3},
    ]
    return Table(
        "made",
        "A_title",
        rows,
        {"name": "name", "value": "value", "x": lambda r: f"x {r['times']}"},
        ("50% so",),
    )


def test_text_of_a_table(table):
    assert table.text().splitlines() == [
        "A_title",
        "",
        "name                  value      x",
        "a_b & 50%            0.1235  x inf",
        "c|d <e> #1 {x} ^~\\$       -    x 3",
        "",
        "* 50% so",
    ]


def test_markdown_escapes_what_would_end_a_cell(table):
    lines = table.markdown().splitlines()
    assert lines[2:4] == ["| name | value | x |", "| --- | ---: | ---: |"]
    assert lines[5] == r"| c\|d <e> #1 {x} ^~\$ | - | x 3 |"
    assert lines[-1] == "- 50% so"


def test_latex_escapes_all_that_it_would_not_print(table):
    text = table.latex()
    assert r"a\_b \& 50\% & 0.1235 & x inf \\" in text
    assert (
        r"c\textbar{}d \textless{}e\textgreater{} \#1 \{x\} "
        r"\textasciicircum{}\textasciitilde{}\textbackslash{}\$ & - & x 3 \\"
    ) in text
    assert r"\caption{A\_title. 50\% so.}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert text.count(r"\begin") == text.count(r"\end")


def test_programs_get_all_digits_and_every_key(table):
    rows = list(csv.DictReader(table.csv().splitlines()))
    assert rows[0] == {"name": "a_b & 50%", "value": "0.123456789", "times": "inf"}
    assert rows[1]["value"] == ""
    (content,) = json.loads(FORMATS["json"]([table]), parse_constant=pytest.fail)
    assert content["rows"][0] == {"name": "a_b & 50%", "value": 0.123456789, "times": "inf"}
    assert content["rows"][1]["value"] is None


def test_several_tables_in_one_text(table):
    assert FORMATS["csv"]([table]) == table.csv()
    assert FORMATS["csv"]([table, table]).count("# made\n") == 2
    for form in ("text", "markdown", "latex"):
        one, two = FORMATS[form]([table]), FORMATS[form]([table, table])
        assert two == f"{one}\n{one}"


def test_tables_are_written_in_every_format(table, tmp_path):
    paths = write_tables(tmp_path / "new/out", "all", [table], for_programs=[table])
    names = {"all.txt", "all.md", "all.tex", "all.json", "all-made.csv", "all-made.parquet"}
    assert {path.name for path in paths} == names == {path.name for path in (tmp_path / "new/out").iterdir()}
    assert len(json.loads((tmp_path / "new/out/all.json").read_text())) == 2
    assert (tmp_path / "new/out/all.txt").read_text() == table.text()
