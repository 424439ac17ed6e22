"""``clipbench tails``, word for word."""

from __future__ import annotations

import shlex

import pytest

from experiments import cli
from experiments.commands.tails import TAILS_HELP
from experiments.runs import find_runs
from torch_clip.tails import FEWEST

SHORT = ("device=cpu", "results_dir=results")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, without pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.analysis.tails.render", lambda *arguments: {})


def clipbench(*argv: str) -> int:
    return cli._dispatch(list(argv))


def test_the_calibrated_noise_is_heavy(capsys):
    assert clipbench("tails", "task=quadratic", *SHORT) == 0
    told = capsys.readouterr().out
    assert "norm of the noise\n  heavy: a power law with infinite variance" in told
    assert "noise in one direction\n  heavy: a power law with infinite variance" in told


def test_its_gaussian_control_is_not_heavy_and_said_to_be_done_the_second_time(capsys):
    assert clipbench("tails", "task=quadratic", "task.noise=gaussian", *SHORT) == 0
    told = capsys.readouterr().out
    assert told.startswith("task=quadratic preset=mini: the only one of this task\nok: 2000 gradients")
    assert "quadratic mini, noise=gaussian: gradients at initial weights; n = 2,000 mini-batches, " in told
    assert told.count("  not heavy: the tail index of the largest 2% is above 4") == 3
    (run,) = find_runs("results/tails")
    assert told.splitlines()[-1] == str(run.path)
    assert clipbench("tails", "task=quadratic", "task.noise=gaussian", *SHORT) == 0
    assert capsys.readouterr().out == told.replace("ok: 2000", "already ok: 2000")


def test_a_report_is_published_when_asked(capsys, tmp_path):
    few = ("tails", "task=quadratic", "samples=100", *SHORT)
    assert clipbench(*few, "out=published/tails") == 0
    (run,) = find_runs("results/tails")
    names = {path.name for path in run.report_dir.iterdir()}
    assert {path.name for path in (tmp_path / "published/tails").iterdir()} == names >= {"tails.json"}
    assert "already ok" not in capsys.readouterr().out
    assert clipbench(*few, "out=again") == 0  # of what was measured before
    assert "already ok" in capsys.readouterr().out
    assert (tmp_path / "again/tails.txt").exists()
    (tmp_path / "file").touch()
    assert clipbench(*few, "out=file/below") == 2
    assert "out: cannot write file/below" in capsys.readouterr().err


def test_few_batches_are_undecided(capsys):
    assert clipbench("tails", "task=quadratic", "samples=100", *SHORT) == 0
    told = capsys.readouterr().out
    assert told.count(f"undecided: 100 values are too few to tell; at least {FEWEST} are needed") == 3


def test_examples_in_the_help_work_when_pasted(capsys):
    lines = [line for line in TAILS_HELP.splitlines() if line.startswith("  clipbench")]
    examples = [shlex.split(line.strip().split("   ")[0])[1:] for line in lines if "checkpoint=" not in line]
    assert len(examples) == 3
    quick = {"task=cola": ("task.num_train=300", "task.num_val=60"), "task=quadratic": ()}
    for argv in examples:
        kept = [setting for setting in argv if not setting.startswith("samples=")]
        assert clipbench(*kept, "samples=100", *quick[argv[1]]) == 0
    assert capsys.readouterr().out.count("ok: 100 gradients") == 3


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("task=cla", "there is no task 'cla'; choose one of cola, "),
        ("sample=5", "there is no key 'sample'; choose one of task, preset, samples, "),
        ("optimizer=sgd", "there is no key 'optimizer'"),
        ("preset=papr", "task cola has no preset 'papr'; it has "),
        ("task=quadratic task.nois=x", "the settings of quadratic are noise, scale. Did you mean 'noise'?"),
        ("task=quadratic task.noise=x", "noise must be student or gaussian, got 'x'"),
        ("seed=1,2", "seed=1,2: clipbench tails takes one value of each"),
        ("-m seed=1", "tails takes KEY=VALUE, got '-m'; clipbench tails --help shows the keys"),
        ("task", "tails takes KEY=VALUE, got 'task'"),
        ("samples=many", "samples must be a whole number from 100"),
        ("checkpoint=nowhere", "there is no nowhere"),
    ],
)
def test_bad_input_is_one_message(argv, told, capsys, tmp_path):
    assert clipbench("tails", *argv.split(), *SHORT) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == "" or captured.out.startswith("task=")
    assert not (tmp_path / "results").exists()


def test_help(capsys):
    for flag in ("-h", "--help"):
        assert clipbench("tails", flag) == 0
        assert capsys.readouterr().out == TAILS_HELP
