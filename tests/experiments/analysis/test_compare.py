"""Comparisons of made-up runs: every number is known, and every table is held to a file."""

import json
import math
import random
import re
from pathlib import Path

import pandas as pd
import pytest

from experiments.analysis import stats
from experiments.analysis.compare import compare, write_comparison
from experiments.analysis.tables import FORMATS
from experiments.errors import UserError

NAN, INF = math.nan, math.inf
GOLDEN = Path(__file__).parent / "golden"
NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
pytestmark = pytest.mark.filterwarnings("error")


def rows(comparison, name: str) -> dict[tuple[str, str], dict]:
    """Rows of a table by task and method."""
    table = next(table for table in comparison.tables if table.name == name)
    return {(row.get("task"), row.get("method")): row for row in table.rows}


def texts(comparison) -> str:
    return "\n".join(write(comparison.tables) for write in FORMATS.values())


@pytest.mark.parametrize("form", FORMATS)
def test_golden(two_tasks, form):
    """All tables in all formats. After a change that is meant, write these files anew and look at them."""
    (text, numbers), (golden_text, golden_numbers) = (
        (re.split(NUMBER, content), [float(number) for number in re.findall(NUMBER, content)])
        for content in (FORMATS[form](compare(two_tasks).tables), (GOLDEN / f"compare.{form}").read_text())
    )
    assert text == golden_text
    assert numbers == pytest.approx(golden_numbers, rel=1e-9)  # another SciPy may round otherwise


def test_order_of_the_runs_changes_nothing(two_tasks):
    first = texts(compare(two_tasks))
    for seed in range(3):
        shuffled = random.Random(seed).sample(two_tasks, k=len(two_tasks))
        assert texts(compare(shuffled)) == first


class TestRaw:
    def test_measured(self, make_runs, make_run):
        runs = [
            *make_runs([0.4, 0.6, 0.5], seconds=2.0, clip_fraction=0.5, clip_unit="tensors"),
            make_run(0.9, seed=3, seconds=20.0, steps=40, curve=[0.9, 0.95, 0.9, 0.9]),
        ]
        row = rows(compare(runs), "raw")["cola", "no_clip"]
        assert (row["seeds"], row["diverged"], row["metric"], row["better"]) == (4, 0, "mcc", "higher")
        assert (row["final"], row["final_min"], row["final_max"]) == (pytest.approx(0.55), 0.4, 0.9)
        assert row["best"] == pytest.approx(0.55)
        assert (row["clip_fraction"], row["clip_unit"]) == (0.5, "tensors")
        assert row["ms_per_step"] == 50
        assert row["ms_per_step_p95"] == pytest.approx(50 + 0.85 * 450)  # between 50 and 500, of four
        assert (row["clip_and_step_share"], row["peak_memory_mb"]) == (0.25, 1024)

    def test_the_best_is_the_best_value_wherever_it_stands(self, make_run):
        runs = [
            make_run(0.3, curve=[0.1, 0.9, 0.2, 0.3]),
            make_run(0.3, task="quadratic", curve=[0.5, NAN, 0.2, 0.3]),
            make_run(NAN, task="quadratic", status="diverged", clipping="norm", curve=[NAN, -INF, 0.4, NAN]),
            make_run(NAN, status="diverged", clipping="norm", curve=[NAN, INF, NAN, NAN]),
        ]
        raw = rows(compare(runs), "raw")
        assert raw["cola", "no_clip"]["best"] == 0.9
        assert raw["quadratic", "no_clip"]["best"] == 0.2
        assert raw["quadratic", "norm"]["best"] == 0.4
        assert raw["cola", "norm"]["best"] == -INF
        assert raw["quadratic", "norm"]["final"] == INF

    def test_a_final_metric_that_is_no_number_counts_as_diverged_whatever_the_status(self, make_run):
        row = rows(compare([make_run(NAN, task="quadratic")]), "raw")["quadratic", "no_clip"]
        assert row["final"] == INF

    def test_a_diverged_run_keeps_nothing_of_a_good_last_evaluation(self, make_run):
        row = rows(compare([make_run(0.99, status="diverged")]), "raw")["cola", "no_clip"]
        assert (row["final"], row["diverged"]) == (-INF, 1)

    def test_times_to_target_are_censored_at_the_budget(self, make_run):
        runs = [
            make_run(0.5, curve=[0.1, 0.4, 0.5, 0.5], seconds=4.0),
            make_run(0.5, curve=[0.45, 0.4, 0.5, 0.5], seed=1, seconds=8.0),
            make_run(0.2, curve=[0.1, 0.1, 0.2, 0.2], seed=2),
            make_run(0.5, curve=[0.1, 0.4, 0.5, NAN], seed=0, status="diverged", clipping="norm"),
            make_run(0.2, curve=[0.1, 0.1, 0.2, 0.2], seed=1, clipping="norm"),
            make_run(0.2, curve=[0.1, NAN, INF, 0.2], seed=2, clipping="norm"),
        ]
        comparison = compare(runs, targets={None: 0.4})
        plain, norm = (rows(comparison, "raw")["cola", method] for method in ("no_clip", "norm"))
        assert (plain["target"], plain["reached"], plain["steps_to_target"]) == (0.4, 2, 20)
        assert plain["steps_to_target_mean"] == pytest.approx((20 + 10 + 40) / 3)
        assert plain["seconds_to_target"] == pytest.approx(2.0)  # of 2.0, 2.0, and one that never did
        assert (norm["reached"], norm["steps_to_target"]) == (1, INF)  # before it diverged
        assert norm["steps_to_target_mean"] == pytest.approx((20 + 40 + 40) / 3)
        assert "> 40" in comparison.tables[0].text()

    def test_a_fast_run_that_missed_the_target_is_not_forgotten_when_its_time_is_over(self, make_run):
        missed = [make_run(0.2, seed=seed, seconds=1.0) for seed in (0, 1)]
        row = rows(compare([*missed, make_run(0.5, seed=2, seconds=9.0)], targets={None: 0.5}), "raw")[
            "cola", "no_clip"
        ]
        assert (row["reached"], row["steps_to_target"], row["seconds_to_target"]) == (1, INF, INF)

    def test_the_target_is_the_references_median_or_that_of_its_seeds_left_out(self, make_runs):
        runs = [*make_runs([0.1, 0.2, 0.3, 0.4, 0.8]), *make_runs([0.9] * 5, clipping="norm")]
        assert rows(compare(runs), "raw")["cola", "norm"]["target"] == 0.3
        apart = compare(runs, seeds=range(3))
        assert rows(apart, "raw")["cola", "norm"]["target"] == pytest.approx(0.6)
        assert rows(apart, "raw")["cola", "norm"]["seeds"] == 3
        assert "on seeds 3, 4" in apart.tables[0].text()

    def test_no_target_where_the_reference_has_none(self, make_runs):
        raw = rows(compare([*make_runs([NAN, NAN, 0.5]), *make_runs([0.5] * 3, clipping="norm")]), "raw")
        assert raw["cola", "norm"]["target"] is None
        assert raw["cola", "norm"]["steps_to_target"] is None

    def test_unfinished_runs_are_told_and_not_compared(self, make_runs, make_run):
        lost = [
            make_run(0.5, seed=7, status="oom"),
            make_run(0.5, seed=8, status="killed"),
            make_run(0.5, seed=9, status="error"),
        ]
        comparison = compare([*make_runs([0.5, 0.6]), *lost])
        assert rows(comparison, "raw")["cola", "no_clip"]["seeds"] == 2
        told = comparison.tables[0].notes[-1]
        assert all(f"{run.path}: {run.status['status']}" in told for run in lost)

    def test_failed_runs_are_counted_in_every_format(self, make_runs, make_run):
        runs = [*make_runs([0.5, 0.6, 0.7]), *make_runs([0.5, NAN], clipping="norm")]
        for seed, status in enumerate(("oom", "error", "timeout", "killed", "oom"), start=2):
            runs.append(make_run(0.9, seed=seed, status=status, clipping="norm"))
        live = make_run(0.9, seed=9, clipping="norm")
        with live.lock():
            live.start(live.config())
            comparison = compare([*runs, live])
        for name in ("raw", "tasks"):
            counts = {key[1]: (row["seeds"], row["failed"]) for key, row in rows(comparison, name).items()}
            assert counts == {"no_clip": (3, 0), "norm": (2, 5)}
        assert rows(comparison, "tasks")["cola", "norm"]["mean"] == -INF  # of two, one of which diverged
        note = (
            "cola: of 7 runs of norm 5 failed, by an error, lack of memory, a kill or a time limit: its mean"
        )
        for table in comparison.tables[:2]:
            assert sum(told.startswith(note) for told in table.notes) == 1
            assert not any("runs of no_clip" in told for told in table.notes)
            for written in (table.text(), table.markdown()):
                assert note in written
            assert "5 failed" in table.latex()
            assert "failed" in table.csv().splitlines()[0].split(",")
        cells = dict(zip(comparison.tables[0].columns, comparison.tables[0].cells()[1], strict=True))
        assert (cells["clipping"], cells["seeds"], cells["diverged"], cells["failed"]) == (
            "norm",
            "2",
            "1",
            "5",
        )
        assert comparison.tables[1].cells()[1][4] == "2 (1 diverged), 5 failed"

    def test_a_method_all_of_whose_runs_failed_is_named(self, make_runs, make_run):
        lost = [make_run(0.5, seed=seed, clipping="agc", status="oom") for seed in (0, 1, 2)]
        told = compare([*make_runs([0.5, 0.6]), *lost]).tables[0].text()
        digest = lost[0].names["digest"]
        assert f"all runs failed, so there is no row: cola-mini/sgd-agc/{digest} (3)" in told

    def test_failed_runs_at_other_seeds_do_not_count(self, make_runs, make_run):
        runs = [*make_runs([0.5, 0.6, 0.7]), make_run(0.5, seed=7, status="oom")]
        for seeds, count in ((None, 1), ({0, 1}, 0), ({0, 7}, 1)):
            comparison = compare(runs, seeds=seeds)
            assert rows(comparison, "raw")["cola", "no_clip"]["failed"] == count
            assert ("seed=7: oom" in comparison.tables[0].text()) == bool(count)

    def test_threads_that_differ_are_told(self, make_run):
        comparison = compare([make_run(0.5), make_run(0.5, seed=1, threads=2)])
        assert "1 or 2 threads: times do not compare" in comparison.tables[0].text()


class TestTasks:
    def test_verdicts(self, two_tasks):
        tasks = rows(compare(two_tasks), "tasks")
        verdicts = {key: row["verdict"] for key, row in tasks.items()}
        assert verdicts == {
            ("cola", "auto_clip"): "no detectable difference",
            ("cola", "no_clip"): "reference",
            ("cola", "norm"): "better",
            ("quadratic", "auto_clip"): "better",
            ("quadratic", "no_clip"): "reference",
            ("quadratic", "norm"): "better",
        }
        diverged = tasks["cola", "auto_clip"]
        assert (diverged["seeds"], diverged["pairs"], diverged["mean"], diverged["test"]) == (
            5,
            5,
            -INF,
            "ranks",
        )
        assert diverged["wins"] == 0.6
        assert diverged["mean_low"] is None

    def test_only_shared_seeds_are_paired(self, make_run):
        runs = [make_run(value, seed=seed) for seed, value in enumerate([0.5, 0.6, 0.4, 0.3])]
        runs += [
            make_run(value, seed=seed, clipping="norm") for seed, value in ((9, 0.0), (2, 0.5), (1, 0.72))
        ]
        row = rows(compare(runs), "tasks")["cola", "norm"]
        (expected,) = stats.judge([([0.72, 0.5], [0.6, 0.4])], higher_is_better=True)
        assert (row["seeds"], row["pairs"]) == (3, 2)
        assert (row["p"], row["difference"]) == (expected.p, expected.difference.value)

    def test_no_shared_seed(self, make_run):
        comparison = compare([make_run(0.5), make_run(0.9, seed=1, clipping="norm")])
        row = rows(comparison, "tasks")["cola", "norm"]
        assert (row["verdict"], row["pairs"], row["detectable"]) == ("no detectable difference", 0, INF)
        assert "norm shares no seed with no_clip" in comparison.tables[1].text()

    def test_one_seed_gives_no_interval(self, make_run):
        comparison = compare([make_run(0.5), make_run(0.9, clipping="norm")])
        row = rows(comparison, "tasks")["cola", "norm"]
        assert (row["mean"], row["mean_low"], row["difference_low"]) == (
            0.9,
            None,
            None,
        )
        assert "too few seeds for any verdict on norm on cola: " in comparison.tables[1].text()
        assert row["verdict"] == "no detectable difference"

    def test_seeds_that_could_not_have_told_even_diverged_runs_are_named(self, make_runs):
        for count, decidable in ((3, False), (4, True)):
            runs = [*make_runs([0.5, 0.6, 0.7, 0.8][:count]), *make_runs([NAN] * count, clipping="norm")]
            comparison = compare(runs)
            assert rows(comparison, "tasks")["cola", "norm"]["decidable"] is decidable
            noted = "too few seeds for any verdict on norm on cola: " in comparison.tables[1].text()
            assert noted is not decidable

    def test_holm_is_over_the_methods_of_a_task(self, make_runs):
        finals = [0.50, 0.52, 0.48]
        runs = [*make_runs(finals), *make_runs([0.55, 0.58, 0.57], clipping="norm")]
        alone = rows(compare(runs), "tasks")["cola", "norm"]
        for number, clipping in enumerate(("zclip", "agc", "spam")):
            runs += make_runs([0.51 + 0.01 * number, 0.5, 0.49], clipping=clipping)
        runs += [
            *make_runs([0.1, 0.2, 0.3], task="voc"),
            *make_runs([0.1, 0.2, 0.4], task="voc", clipping="norm"),
        ]
        among = rows(compare(runs), "tasks")["cola", "norm"]
        assert alone["p_holm"] == alone["p"] == among["p"]
        assert among["p_holm"] == pytest.approx(4 * among["p"])

    def test_each_optimizer_has_its_own_reference(self, make_runs):
        runs = []
        for optimizer, base in (("sgd", 0.3), ("adam", 0.6)):
            runs += make_runs([base, base + 0.01, base - 0.02], optimizer=optimizer)
            runs += make_runs([base + 0.1, base + 0.11, base + 0.09], optimizer=optimizer, clipping="norm")
        comparison = compare(runs)
        tasks = rows(comparison, "tasks")
        assert tasks["cola", "sgd norm"]["reference"] == "sgd no_clip"
        assert tasks["cola", "adam norm"]["reference"] == "adam no_clip"
        assert "the reference of its own optimizer" in comparison.tables[1].text()

    def test_each_learning_rate_has_its_own_reference(self, make_runs):
        runs = []
        for lr in (0.1, 0.01):
            for clipping in ("no_clip", "norm"):
                runs += make_runs([0.5, 0.6], clipping=clipping, settings={"optimizer.lr": lr})
        runs += make_runs([0.5, 0.6], clipping="agc", settings={"optimizer.lr": 1.0})
        comparison = compare(runs)
        tasks = rows(comparison, "tasks")
        assert tasks["cola", "norm lr=0.1"]["reference"] == "no_clip lr=0.1"
        assert tasks["cola", "norm lr=0.01"]["reference"] == "no_clip lr=0.01"
        assert tasks["cola", "agc lr=1"]["reference"] is None
        assert tasks["cola", "agc lr=1"]["verdict"] is None
        assert "nothing to compare agc lr=1 with; --reference" in comparison.tables[1].text()

    def test_without_a_reference_the_first_note_says_so(self, make_runs):
        comparison = compare(
            [*make_runs([0.5, 0.6], clipping="agc"), *make_runs([0.7, 0.6], clipping="norm")]
        )
        assert {row["verdict"] for row in comparison.tables[1].rows} == {None}
        assert comparison.tables[1].notes[0] == (
            "cola: no verdict, as there is nothing to compare agc, norm with; --reference names a method"
        )

    def test_a_reference_by_name(self, make_runs):
        runs = [*make_runs([0.5, 0.6]), *make_runs([0.7, 0.9], clipping="norm")]
        for name in (0.3, 1.0):
            runs += make_runs([name, 0.5], clipping="agc", settings={"clipping.threshold": name})
        tasks = rows(compare(runs, reference="norm"), "tasks")
        assert tasks["cola", "norm"]["verdict"] == "reference"
        assert tasks["cola", "no_clip"]["reference"] == "norm"
        tasks = rows(compare(runs, reference="agc threshold=0.3"), "tasks")
        assert tasks["cola", "norm"]["reference"] == "agc threshold=0.3"
        with pytest.raises(
            UserError, match="--reference: 'agc' is not the name of one method; choose one of agc"
        ):
            compare(runs, reference="agc")

    def test_another_metric(self, make_runs):
        runs = [*make_runs([0.5, 0.6, 0.7]), *make_runs([0.5, 0.6, 0.7], clipping="norm")]
        row = rows(compare(runs, metric="loss"), "raw")["cola", "norm"]
        assert (row["metric"], row["better"], row["final"]) == ("loss", "lower", 1.0)
        with pytest.raises(UserError, match=r"cola has no 'acc'; choose one of loss, mcc\."):
            compare(runs, metric="acc")


class TestAcross:
    def test_scores_ranks_and_profile(self, make_runs):
        runs = [
            *make_runs([0.5, 0.5]),
            *make_runs([0.75, NAN], clipping="norm"),
            *make_runs([0.02, 0.02], task="quadratic", curve=[0.2, 0.2, 0.02, 0.02]),
            *make_runs([0.0002, 0.0002], task="quadratic", clipping="norm", curve=[0.2, 0.02, 0.01, 0.0002]),
        ]
        comparison = compare(runs)
        across = {row["method"]: row for row in comparison.tables[2].rows}
        # The quadratic's losses begin at 2.0 and 2.01, so 0.02 is two decades down, and 0.0002 four.
        way = math.log10(2.005 / 0.0002) / math.log10(2.005 / 0.02)
        assert across["no_clip"]["score"] == 1
        assert across["norm"]["score"] == pytest.approx((1.5 + way) / 2)  # the middle of 0, 1.5, way, way
        assert across["norm"]["rank"] == pytest.approx(((1 + 2) / 2 + (1 + 1) / 2) / 2)
        assert across["no_clip"]["time ratio on quadratic"] == 1.5
        # On cola half of norm's runs reached 0.5, at step 30, the reference's at step 40.
        assert across["no_clip"]["time ratio on cola"] == pytest.approx(40 / 30)
        assert across["no_clip"]["profile"] == pytest.approx(((4 - 40 / 30) / 3 + (4 - 1.5) / 3) / 2)
        assert across["norm"]["profile"] == 1
        assert "approximate, as some have 2 seeds" in comparison.tables[2].text()

    def test_ten_seeds_are_not_approximate(self, make_runs):
        finals = [0.5 + 0.01 * seed for seed in range(10)]
        runs = [
            run
            for task in ("cola", "voc")
            for clipping in ("no_clip", "norm")
            for run in make_runs(finals, task=task, clipping=clipping)
        ]
        assert "approximate" not in compare(runs).tables[2].text()

    def test_methods_that_are_not_on_every_task_are_named(self, two_tasks, make_runs):
        comparison = compare([*two_tasks, *make_runs([0.5, 0.6], clipping="agc")])
        assert [row["method"] for row in comparison.tables[2].rows] == ["auto_clip", "no_clip", "norm"]
        assert "not on every task, so not here: agc" in comparison.tables[2].text()

    def test_one_task_has_no_such_table(self, make_runs):
        comparison = compare([*make_runs([0.5, 0.6]), *make_runs([0.5, 0.6], clipping="norm")])
        assert [table.name for table in comparison.tables] == ["raw", "tasks"]

    def test_without_a_reference_no_task_has_a_target(self, make_runs):
        comparison = compare(
            [
                run
                for task in ("cola", "voc")
                for clipping in ("auto_clip", "norm")
                for run in make_runs([0.5, 0.6], task=task, clipping=clipping)
            ]
        )
        across = comparison.tables[2]
        assert [row["rank"] for row in across.rows] == [1.5, 1.5]
        assert not any("time ratio" in name for row in across.rows for name in row)

    def test_a_metric_that_training_does_not_record_has_no_floor_and_no_score(self, make_runs):
        comparison = compare(
            [
                run
                for task in ("cola", "voc")
                for clipping in ("no_clip", "norm")
                for run in make_runs(
                    [0.5, 0.6], task=task, clipping=clipping, higher_is_better=False, trained=False
                )
            ]
        )
        across = comparison.tables[2]
        assert [row["score"] for row in across.rows] == [None, None]
        assert [row["rank"] for row in across.rows] == [1.5, 1.5]
        assert "without cola, voc, which" in across.text()

    def test_a_task_whose_reference_learned_nothing_is_left_out_of_the_score(self, two_tasks, make_runs):
        runs = [
            *two_tasks,
            *make_runs([NAN] * 5, task="voc"),
            *make_runs([0.5] * 5, task="voc", clipping="norm"),
        ]
        runs += make_runs([0.6] * 5, task="voc", clipping="auto_clip")
        comparison = compare(runs)
        told = comparison.tables[2].text()
        assert "without voc, which has nothing to scale it by" in told
        assert all(math.isfinite(row["score"]) for row in comparison.tables[2].rows)
        # Without clipping: on voc always last, on cola three times of five, on the quadratic always.
        assert comparison.tables[2].rows[1]["rank"] == pytest.approx((3 + (3 * 3 + 2 * 2) / 5 + 3) / 3)


def test_the_run_behind_every_number(two_tasks):
    table = compare(two_tasks).runs
    assert sorted(row["path"] for row in table.rows) == sorted(str(run.path) for run in two_tasks)
    (row,) = (row for row in table.rows if row["path"] == str(two_tasks[6].path))
    assert (row["method"], row["seed"], row["status"], row["final"]) == ("norm", 1, "ok", 0.63)


def test_nothing_to_compare(make_run):
    with pytest.raises(UserError, match=r"no finished run to compare$"):
        compare([])
    killed = make_run(0.5, status="killed")
    with pytest.raises(UserError, match=r"no finished run to compare, but .*: killed"):
        compare([killed])
    with pytest.raises(UserError, match="no run has one of 7; there are 0"):
        compare([make_run(0.5)], seeds=[7])
    with pytest.raises(UserError, match=r"no task 'colla' here; choose one of cola\. Did you mean 'cola'\?"):
        compare([make_run(0.5)], targets={"colla": 0.5})


def test_written(two_tasks, tmp_path):
    paths = write_comparison(two_tasks, tmp_path / "out")
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {path.suffix for path in paths} == {
        ".txt",
        ".md",
        ".tex",
        ".json",
        ".csv",
        ".parquet",
        ".png",
        ".pdf",
    }
    comparison = compare(two_tasks)
    tables = json.loads((tmp_path / "out/compare.json").read_text(), parse_constant=pytest.fail)
    assert [table["name"] for table in tables] == ["raw", "tasks", "across", "runs"]
    assert tables[1]["rows"][0]["mean"] == "-inf"
    for table in (*comparison.tables, comparison.runs):
        for read, suffix in ((pd.read_csv, "csv"), (pd.read_parquet, "parquet")):
            frame = read(tmp_path / f"out/compare-{table.name}.{suffix}")
            assert list(frame) == list(table.rows[0])
            held = [[None if pd.isna(value) else value for value in row] for row in frame.to_numpy(object)]
            assert held == [list(row.values()) for row in table.rows]
    drawn = pd.read_csv(tmp_path / "out/comparison-quadratic.csv")
    assert set(drawn["method"].dropna()) == {"auto_clip", "no_clip", "norm"}


def test_a_comparison_of_one_task_has_one_picture(make_runs, tmp_path):
    names = {path.name for path in write_comparison(make_runs([0.5, 0.6]), tmp_path / "out")}
    assert {"comparison.png", "comparison.pdf", "comparison.csv"} <= names


def test_drawn_twice_it_is_the_same_bytes(two_tasks, tmp_path):
    first, second = (
        {path.name: path.read_bytes() for path in write_comparison(two_tasks, tmp_path / name)}
        for name in "ab"
    )
    assert first == second
