"""What a user types, word for word, and what comes back."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from experiments import cli
from experiments.commands.run import RUN_HELP
from experiments.runs import find_runs
from experiments.tasks.cola import CoLA
from experiments.training.presets import conf_dir
from torch_clip import CLIPPINGS, Clipping
from torch_clip.thresholds import Constant

SHORT = ["max_steps=4", "eval_every=2", "log_every=3", "task.num_train=300", "task.num_val=60", "quiet=true"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def clipbench(*argv: str) -> int:
    try:
        return cli._dispatch(list(argv))
    except SystemExit as stop:  # argparse's way out
        return stop.code


def records(run) -> pd.DataFrame:
    return run.records()


def the_run(root="results"):
    (run,) = find_runs(root)
    return run


def test_help_imports_neither_torch_nor_hydra():
    code = (
        "import sys; sys.argv = ['clipbench', '--help']; from experiments import cli\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'hydra', 'numpy', 'omegaconf', 'transformers'} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "[]"
    assert "clipbench run task=cola clipping=auto_clip" in told


def test_without_the_extra_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['hydra'] = None; sys.argv = ['clipbench', 'run']\n"
        "from experiments import cli; cli.main()"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert "pip install '.[bench]'" in told.stderr


def test_examples_in_the_help_work_when_pasted(capsys):
    examples = [
        shlex.split(line.strip().split("   ")[0])[1:]
        for text in (cli.HELP, RUN_HELP)
        for line in text.splitlines()
        if line.startswith("  clipbench") and "--help" not in line
    ]
    assert len(examples) >= 8
    for argv in examples:
        short = [setting for setting in SHORT if setting.split("=")[0] not in " ".join(argv)]
        added = {"run": short, "bench": ["--rounds", "1", "--methods", "norm"], "check": ["--fast"]}
        added |= {"prepare": ["preset=mini"], "tails": ["samples=100", "device=cpu"]}
        assert clipbench(*argv, *added.get(argv[0], [])) == 0, argv
    assert "auto_clip" in capsys.readouterr().out


def test_a_run_leaves_the_folder_that_the_readme_shows(capsys):
    assert clipbench("run", "task=cola", "clipping=auto_clip", *SHORT) == 0
    run = the_run()
    assert capsys.readouterr().out.splitlines()[-1] == str(run.path)
    assert {path.name for path in run.path.iterdir() if not path.name.startswith(".")} == {
        "config.yaml",
        "status.json",
        "metrics.parquet",
        "summary.json",
        "curves.png",
        "checkpoints",
    }
    assert run.path.parts[-6:-2] == ("runs", "adhoc", "cola-mini", "adamw-auto_clip")
    table = records(run)
    steps = table[table["lr"].notna()]
    assert steps["step"].tolist() == [1, 2, 3, 4]
    assert table[table["val/mcc"].notna()]["step"].tolist() == [2, 4]
    for column in ("train/loss", "grad_norm", "threshold", "clip_coef", "clipped"):
        assert steps[column].notna().all(), column
    # The first norm is its own percentile; later thresholds are numpy's.
    for k in range(4):
        expected = steps["grad_norm"].iloc[: k + 1].quantile(0.75)
        assert steps["threshold"].iloc[k] == pytest.approx(expected, rel=1e-12)
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["clip_fraction"] == pytest.approx(steps["clipped"].mean())
    assert sum(summary["time"].values()) == pytest.approx(summary["seconds"])
    assert set(summary["time"]) == {"data", "forward", "backward", "clip+step"}
    assert summary["threads"] > 0
    assert summary["peak_memory_bytes"] > 1e8
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["clipping"]["percentile"] == 0.75
    assert config["optimizer"]["lr"] == 0.002


def test_the_same_command_twice_gives_the_same_numbers_and_a_finished_run_is_not_run_again(capsys):
    argv = ["run", "clipping=linear_rand_norm", "clipping.threshold=0.5", *SHORT]
    for place in ("a", "b"):
        assert clipbench(*argv, f"results_dir={place}") == 0
    first, second = the_run("a"), the_run("b")
    pd.testing.assert_frame_equal(records(first), records(second), check_exact=True)

    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    capsys.readouterr()
    assert clipbench(*argv, "results_dir=a") == 0
    told = capsys.readouterr().out
    assert "already ok" in told
    assert str(first.path) in told
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    assert clipbench(*argv, "results_dir=a", "force=true") == 0
    assert (first.path / "summary.json").stat().st_mtime_ns != before[first.path / "summary.json"]
    pd.testing.assert_frame_equal(records(the_run("a")), records(second), check_exact=True)


def test_choosing_a_method_shifts_neither_data_order_nor_dropout(monkeypatch):
    seen = {}
    forward = CoLA.forward

    def noted(task, model, batch):
        if model.training:
            seen[name].append((batch["input_ids"].tolist(), torch.get_rng_state().tolist()))
        return forward(task, model, batch)

    monkeypatch.setattr(CoLA, "forward", noted)
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)
    for name in CLIPPINGS:
        seen[name] = []
        dropout = ["preset.model.config.hidden_dropout_prob=0.3", "max_steps=2"]
        assert clipbench("run", f"clipping={name}", *dropout, *SHORT[1:]) == 0
    assert len(seen["norm"]) == 2
    assert all(batches == seen["norm"] for batches in seen.values())


def test_a_diverging_run_ends_as_diverged_with_its_curve(capsys):
    # Bounded logits never overflow, so the weights are sent to infinity directly.
    argv = ["run", "clipping=no_clip", "optimizer=sgd", "optimizer.lr=1e38", "max_steps=60", *SHORT[1:]]
    assert clipbench(*argv) == 0
    run = the_run()
    assert run.status["status"] == "diverged"
    assert run.curves_path.exists()
    assert "diverged" in capsys.readouterr().out
    assert records(run)["step"].max() < 60


def test_a_problem_whose_metric_is_its_loss_runs_from_end_to_end(capsys):
    argv = ["task=quadratic", "clipping=no_clip,norm", "seed=0,1", "max_steps=30", "eval_every=15"]
    assert clipbench("run", "-m", *argv) == 0
    assert "the only one of this task" in capsys.readouterr().out
    found = find_runs("results/runs")
    assert len(found) == 4
    for run in found:
        assert run.curves_path.exists()
        table, summary = records(run), run.summary()
        recorded = table[table["lr"].isna()]
        assert set(recorded.dropna(axis=1)) == {"step", "epoch", "val/loss"}
        assert recorded["val/loss"].iloc[-1] == pytest.approx(table["train/loss"].mean(), rel=1e-6)
        assert (summary["metric"], summary["higher_is_better"]) == ("loss", False)
        assert summary["best"]["value"] == recorded["val/loss"].min()
    # At the first point, where all stand together, the gradient shows the noise: of the seed, not the method.
    first = {(run.names["clipping"], run.names["seed"]): records(run)["grad_norm"].iloc[0] for run in found}
    assert first["norm", "0"] == first["no_clip", "0"] != first["norm", "1"] == first["no_clip", "1"]


def test_data_for_a_task_that_has_none_is_refused(tmp_path, capsys):
    assert clipbench("run", "task=quadratic", "data_dir=.") == 2
    assert "task quadratic has no data that data_dir=. could replace" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_every_combination():
    assert clipbench("run", "-m", "clipping=norm,auto_clip", "seed=0,1", *SHORT) == 0
    found = {(run.names["clipping"], run.names["seed"]) for run in find_runs("results/runs")}
    assert found == {("norm", "0"), ("norm", "1"), ("auto_clip", "0"), ("auto_clip", "1")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["clipping=nrm,auto_clip"], "Did you mean 'norm'?"),
        (["clipping=norm", "clipping.threshold=1,-2"], "threshold must be in [0, inf], got -2"),
        (
            ["clipping=norm,auto_clip", "seed=0,1,-1"],
            "seed must be a whole number from 0 to 2147483647, got -1",
        ),
        (["optimizer.lr=0.1,-1"], "Invalid learning rate: -1"),
        (["optimizer=sgd,sstm", "clipping=auto_clip"], "SSTM schedules the threshold, and AutoClip"),
        (["experiment=adhoc,quadratic_grid"], "one experiment a launch"),
        (
            ["task=cola,regression", "preset=mini"],
            "no setting 'num_train'; the settings of regression are data_seed, batch_size.",
        ),
        (["seed=interval(0,3)"], "no sweep runs every value of an interval"),
        (["seed=0,1", "--resolve"], "a sweep takes --dry-run and --config-dir FOLDER, got '--resolve'"),
        (["seed=0,1", "force=yes"], "force must be true or false, got 'yes'"),
        (["clipping=norm", "clipping.treshold=1,2"], "Did you mean 'threshold'?"),
        (["results_dir=/dev/null/x", "seed=0,1"], "results_dir: cannot write"),
        (["preset=mini,paper"], "one preset a launch"),
        (["seed=0,1", "--cfg", "job"], "leave out -m"),
    ],
)
def test_a_sweep_of_bad_input_leaves_nothing_behind(settings, message, tmp_path, capsys):
    assert clipbench("run", "-m", *settings, *SHORT) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_so_and_goes_on(monkeypatch, capsys):
    from experiments.training import train as loop

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return evaluation(*args)

    evaluation = loop.evaluation
    monkeypatch.setattr(loop, "evaluation", interrupted)
    assert clipbench("run", *SHORT) == 130
    run = the_run()
    assert run.status["status"] == "killed"
    assert capsys.readouterr().out.splitlines() == [
        "killed: stopped by SIGINT after step 3; the same command goes on from there",
        str(run.path),
    ]
    monkeypatch.undo()
    monkeypatch.chdir(run.path.parents[6])
    assert clipbench("run", *SHORT) == 0
    assert records(run)["lr"].count() == 4
    run.curves_path.unlink()  # as if interrupted while drawing
    assert clipbench("run", *SHORT) == 0
    assert run.curves_path.exists()


def test_nonfinite_error_names_the_parameter_without_a_traceback(capsys):
    argv = ["clipping=norm", "clipping.nonfinite=error", "optimizer=sgd", "optimizer.lr=1e38"]
    argv += ["max_steps=60", "eval_every=60", *SHORT[2:]]
    assert clipbench("run", *argv) == 1
    told = capsys.readouterr()
    assert "bert.embeddings" in told.out
    assert "Traceback" not in told.err
    assert the_run().status["status"] == "error"
    assert clipbench("run", *argv) == 1
    assert "already error: failed before" in capsys.readouterr().out


BAD_INPUT = {
    "task=colla": "Did you mean 'cola'?",
    "clipping=autoclip": "Did you mean 'auto_clip'?",
    "optimizer=sdg": "Did you mean 'sgd'?",
    "preset=papre": "it has frozen, mini, paper, reference. Did you mean 'paper'?",
    "cliping=norm": "there is no key 'cliping'; choose one of task,",
    "optimizer.lrr=0.1": "the chosen optimizer has no setting 'lrr'; the settings are lr, betas,",
    "task.model.nam_or_path=x": "has no setting 'nam_or_path'; the settings are name_or_path, config.",
    "preset.lr.sgdd=1": "the chosen preset.lr has no setting 'sgdd'; the settings are sgd, adam, adamw",
    "hydra/launcher=jobblib": "there is no hydra/launcher 'jobblib'; choose one of basic",
    "optimizer=SGDD": "Did you mean 'sgd'?",
    "logger=null": "logger=null: name an option; clipbench list logger shows them",
    "~clipping": "nothing can be taken out",
    "seed=0,1": "several values make a sweep, which -m asks for",
    "seed=18446744073709551616": "seed must be a whole number from 0 to 2147483647, got 18446744073709551616",
    "log_every=99999999999": "log_every must be a whole number from 1 to 2147483647",
    "results_dir=": "results_dir must be a folder, got ''",
    "results_dir=null": "results_dir must be a folder, got None",
    "results_dir=/dev/null/x": "results_dir: cannot write /dev/null/x",
    "task.model.name_or_path=5": "5",
    "data_dir=2024": "2024",
    "clipping._target_=nope.X": "No module named 'nope'",
    "clipping.percentile=abc": "given percentile=abc",
    "optimizer.lr=abc": "given lr=abc",
    "clipping.percentil=0.5": "window, nonfinite. Did you mean 'percentile'?",
    "clipping.threshold=0.5": "the settings of auto_clip are percentile, window, nonfinite.",
    "clipping.percentile=75": "percentile must be in (0, 1], got 75; for the 75th percentile give 0.75",
    "optimizer.lr=-1": "Invalid learning rate: -1",
    "+optimizer.lamda=3": "unexpected keyword argument 'lamda'",
    "max_steps=0": "max_steps must be a whole number from 1 to 2147483647, got 0",
    "max_steps=many": "max_steps must be a whole number from 1 to 2147483647, got 'many'",
    "seed=1.5": "seed must be a whole number from 0 to 2147483647, got 1.5",
    "precision=fp61": "precision must be one of fp32, bf16, fp16, got 'fp61'. Did you mean 'fp16'?",
    "keep=bets": "keep must be one of best, last, all, none, got 'bets'. Did you mean 'best'?",
    "accumulate=0": "accumulate must be a whole number from 1",
    "warmup_steps=-1": "warmup_steps must be a whole number from 0",
    "checkpoint_every=0.5": "checkpoint_every must be a whole number from 1",
    "max_seconds=0": "max_seconds must be a number above 0, or null for no limit, got 0",
    "compile=perhaps": "compile must be true or false, got 'perhaps'",
    "device=cuda:7": "device=cuda:7: there are",
    "device=gpu": "device must be auto, cpu, cuda or cuda:N, got 'gpu'",
    "data_dir=nowhere": "nowhere",
    "task.model.name_or_path=./nowhere": "nowhere",
    "task.model.name_or_path=.": "config.json",
    "clipping.nonfinite=ignore": "nonfinite must be one of skip, propagate, error",
    "optimizer.lr=": "optimizer",
    "optimizer.lr=[": "cannot read 'optimizer.lr=[': put the value in quotes",
}


@pytest.mark.parametrize("setting", BAD_INPUT)
def test_bad_input_gets_one_message_and_leaves_nothing_behind(setting, tmp_path, capsys):
    clipping = [] if setting.startswith("clipping=") else ["clipping=auto_clip"]
    short = [word for word in SHORT if word.split("=")[0] != setting.split("=")[0]]
    assert clipbench("run", *clipping, *short, setting) == 2
    told = capsys.readouterr()
    assert BAD_INPUT[setting] in told.err
    assert told.err.startswith("clipbench: ")
    assert "Traceback" not in told.err
    assert told.err.count("\n") <= 2
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_commands_and_lists_name_the_nearest(capsys):
    assert clipbench("rum") == 2
    assert "Did you mean 'run'?" in capsys.readouterr().err
    assert clipbench("list", "clippings") == 2
    assert "Did you mean 'clipping'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list", "preset"], ["help"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(command):
    code = "import sys; from experiments import cli; sys.argv[1:] = sys.stdin.read().split(); cli.main()"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        told = subprocess.run(
            [sys.executable, "-c", code],
            input=" ".join(command),
            text=True,
            stdout=closed,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (told.stderr, told.returncode) == ("", 1)


def test_list_shows_every_option_with_a_line_each(capsys):
    assert clipbench("list", "clipping") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {*CLIPPINGS, "chain"}
    assert all(len(line.split()) > 2 for line in lines)
    for group in ("task", "optimizer", "scheduler", "preset", "logger", "experiment"):
        assert clipbench("list", group) == 0
        for line in capsys.readouterr().out.splitlines():
            assert len(line.split()) > 2, line


def test_list_runs_shows_status_and_best_metric(capsys):
    assert clipbench("list", "runs") == 0
    assert "no runs in" in capsys.readouterr().out
    clipbench("run", *SHORT)
    capsys.readouterr()
    assert clipbench("list", "runs") == 0
    told = capsys.readouterr().out
    assert " ok " in told
    row = told.splitlines()[1].split()
    assert row[7:9] == ["mcc", "higher"]
    assert float(row[9]) == pytest.approx(the_run().summary()["best"]["value"], abs=1e-4)


def test_yaml_and_list_of_methods_agree():
    # Under a preset that says nothing of clipping.
    files = {
        path.stem: OmegaConf.create({"preset": {}, "seed": 0, "node": OmegaConf.load(path)}).node
        for path in (conf_dir() / "clipping").glob("*.yaml")
    }
    chain = files.pop("chain")  # of any number of methods, so none of the list
    assert chain["_target_"] == "torch_clip.chain.Chain"
    assert set(files) == set(CLIPPINGS)
    for name, node in files.items():
        assert node["_target_"] == f"torch_clip.methods.{CLIPPINGS[name].__name__}"
        settings = {key: value for key, value in node.items() if key not in ("_target_", "seed")}
        built = CLIPPINGS[name](**settings)
        assert repr(built) == repr(CLIPPINGS[name]())  # the YAML repeats the defaults of the class


def test_every_optimizer_runs_clipped_by_every_method_or_says_why_not(monkeypatch, capsys):
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)
    options = {"optimizer": sorted(p.stem for p in (conf_dir() / "optimizer").glob("*.yaml"))}
    options["clipping"] = sorted(CLIPPINGS)
    short = ["task=quadratic", "max_steps=2", "eval_every=2", "quiet=true", "clipping.nonfinite=error"]
    schedulable = {
        name
        for name, made in ((name, CLIPPINGS[name]()) for name in options["clipping"])
        if isinstance(made, Clipping) and isinstance(made.threshold, Constant)
    }
    for optimizer in options["optimizer"]:
        taken = schedulable if optimizer == "sstm" else set(CLIPPINGS)
        assert clipbench("run", "-m", f"optimizer={optimizer}", f"clipping={','.join(taken)}", *short) == 0
    done = {
        (run.names["optimizer"], run.names["clipping"]): run.summary() for run in find_runs("results/runs")
    }
    assert capsys.readouterr().err == ""
    for optimizer in options["optimizer"]:
        for clipping in options["clipping"]:
            if optimizer != "sstm" or clipping in schedulable:
                assert done[optimizer, clipping]["status"] == "ok", (optimizer, clipping)
                assert done[optimizer, clipping]["steps"] == 2
                continue
            assert (optimizer, clipping) not in done
            assert clipbench("run", f"optimizer={optimizer}", f"clipping={clipping}", *short) == 2
            name = CLIPPINGS[clipping].__name__
            assert f"SSTM schedules the threshold, and {name}" in capsys.readouterr().err
    assert len(done) < len(options["optimizer"]) * len(options["clipping"]) - 3


def test_check_holds_a_clipping_from_outside_to_the_laws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    (tmp_path / "outside.py").write_text(
        "from torch_clip.methods import NormClip\n"
        "class Mine(NormClip):\n    pass\n"
        "class Forgets(NormClip):\n    def state_dict(self):\n        return {}\n"
        "class Needs(NormClip):\n    def __init__(self, threshold):\n        super().__init__(threshold)\n"
    )
    assert clipbench("check", "--fast", "outside.Mine") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "outside.Mine"
    assert all(line.split()[0] == "passed" for line in lines[1:])
    assert clipbench("check", "--fast", "outside.Forgets", "norm") == 1
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if line.startswith("  failed")] == [
        "resume",
        "optimizer_state",
    ]
    for name, message in {
        "outside.Needs": "must be callable without arguments",
        "outside.Nothing": "outside has no 'Nothing'",
        "nowhere.Mine": "there is no module 'nowhere'",
        "nrm": "Did you mean 'norm'?",
    }.items():
        assert clipbench("check", name) == 2
        assert message in capsys.readouterr().err


def test_bench_writes_table_chart_and_numbers(tmp_path, capsys):
    argv = ["--models", "mlp", "--optimizers", "sgd", "--methods", "norm,no_clip,coordinate_wise,auto_clip"]
    assert clipbench("bench", *argv, "--rounds", "2", "--out", "price") == 0
    told = capsys.readouterr().out
    saved = json.loads((tmp_path / "price" / "bench.json").read_text())
    names = [row["contender"] for row in saved["rows"]]
    assert names == [
        *("plain fused", "norm alone", "clip_grad_norm_ + fused", "norm, clipped", "norm, not clipped"),
        *("no_clip, not clipped", "coordinate_wise, clipped", "coordinate_wise, not clipped"),
        *("auto_clip, clipped", "auto_clip, not clipped", "coordinate_wise (measure=False), clipped"),
        *("auto_clip, 1,000 norms", "auto_clip, 1,000,000 norms"),
    ]
    assert all(row["milliseconds"] > 0 for row in saved["rows"])
    assert saved["rows"][0]["to_plain"] == saved["rows"][2]["to_torch"] == 1.0
    assert all(f"| {name} |" in told for name in names)
    lines = (tmp_path / "price" / "bench.csv").read_text().splitlines()
    assert len(lines) == 1 + len(names)
    for suffix, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "price" / f"bench.{suffix}").read_bytes().startswith(magic)
    assert clipbench("bench", "--models", "resnet81") == 2
    assert "Did you mean 'resnet18'?" in capsys.readouterr().err


def test_bench_clips_where_it_says_so_and_only_there():
    from experiments.training import bench
    from torch_clip.norms import Grads, tensor_norms

    params = [torch.nn.Parameter(torch.randn(30, 20)), torch.nn.Parameter(torch.randn(20))]
    for name in CLIPPINGS:
        for clips in (True, False):
            for param in params:
                param.grad = torch.randn_like(param) * 1e-2
            norms = tensor_norms(Grads(params))
            clipping = bench._tuned(name, clips, norms)
            if clipping is None:
                assert name in (("no_clip", "spike_guard") if clips else ("adagn", "normalized"))
                continue
            for _ in range(2 if name == "spam" else 1):  # that it has an average
                told = clipping.clip_(params)
            if name not in ("adagn", "stable_spam", "normalized"):  # which lengthen
                assert (told.clipped > 0.3) == clips, name
