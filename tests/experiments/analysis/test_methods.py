"""What a run is compared as, and what must not share a comparison."""

import pytest

from experiments.analysis.methods import finished, identify
from experiments.errors import UserError


def labels(runs, *, allow_mixed=False) -> list[tuple[str, str]]:
    """Task and method of each run, in the order of the runs."""
    results, others = finished(runs)
    assert not others
    identify(results, allow_mixed=allow_mixed)
    found = {result.run.path: (result.task, result.method) for result in results}
    return [found[run.path] for run in runs]


def test_a_method_is_its_clipping_where_nothing_else_differs(make_run):
    runs = [make_run(0.5, clipping="norm"), make_run(0.5), make_run(0.5, task="voc", clipping="norm")]
    assert labels(runs) == [("cola", "norm"), ("cola", "no_clip"), ("voc", "norm")]


def test_two_thresholds_are_two_methods(make_run):
    runs = [
        make_run(0.5, clipping="norm", settings={"clipping.threshold": 0.3}),
        make_run(0.5, clipping="norm", settings={"clipping.threshold": 1.0}, seed=1),
        make_run(0.5, clipping="coordinate_wise", settings={"clipping.threshold": 0.1}),
    ]
    # The last has one threshold only, which differs from those of another clipping: that says nothing.
    assert [method for _, method in labels(runs)] == [
        "norm threshold=0.3",
        "norm threshold=1",
        "coordinate_wise",
    ]


def test_learning_rates_optimizers_and_schedulers_that_differ(make_run):
    runs = [
        make_run(0.5, clipping="norm"),
        make_run(0.5, clipping="norm", settings={"optimizer.lr": 0.01}),
        make_run(0.5, optimizer="adam", settings={"optimizer.betas": [0.9, 0.99]}),
        make_run(0.5, optimizer="adam", scheduler="cosine", settings={"scheduler._target_": "cosine"}),
    ]
    assert [method for _, method in labels(runs)] == [
        "sgd norm scheduler=constant lr=0.1",
        "sgd norm scheduler=constant lr=0.01",
        "adam no_clip scheduler=constant betas=[0.9,0.99]",
        "adam no_clip scheduler=cosine",
    ]


def test_a_setting_of_the_loop_that_differs(make_run):
    runs = [make_run(0.5), make_run(0.5, settings={"precision": "bf16"})]
    assert [method for _, method in labels(runs)] == ["no_clip precision=fp32", "no_clip precision=bf16"]


def test_what_repeats_another_setting_is_said_once(make_run):
    runs = [
        make_run(0.5, settings={"max_steps": steps, "scheduler.num_training_steps": steps})
        for steps in (40, 80)
    ]
    assert [method for _, method in labels(runs, allow_mixed=True)] == [
        "no_clip max_steps=40",
        "no_clip max_steps=80",
    ]


def test_settings_that_end_alike_keep_their_path(make_run):
    runs = [
        make_run(0.5, clipping="norm", settings={"clipping.beta": a, "optimizer.beta": b})
        for a, b in ((1, 2), (2, 3), (1, 3))
    ]
    assert [method for _, method in labels(runs)] == [
        "norm clipping.beta=1 optimizer.beta=2",
        "norm clipping.beta=2 optimizer.beta=3",
        "norm clipping.beta=1 optimizer.beta=3",
    ]


def test_what_differs_in_the_task_makes_another_task(make_run):
    runs = [make_run(0.5), make_run(0.5, settings={"task.noise": "gaussian"}), make_run(0.5, task="voc")]
    assert labels(runs) == [
        ("cola noise=none", "no_clip"),
        ("cola noise=gaussian", "no_clip"),
        ("voc", "no_clip"),
    ]


def test_seeds_of_one_method_are_one(make_run):
    runs = [
        make_run(0.5, seed=seed, settings={"clipping.seed": seed, "num_workers": seed}) for seed in (0, 1)
    ]
    assert labels(runs) == [("cola", "no_clip")] * 2


def test_the_same_run_in_two_experiments_counts_once(make_run):
    results, _ = finished([make_run(0.5), make_run(0.5, experiment="again")])
    assert len(results) == 1


def test_unfinished_runs_are_named(make_run):
    done, killed = make_run(0.5), make_run(0.5, seed=1, status="killed")
    results, others = finished([done, killed])
    assert [result.run for result in results] == [done]
    assert list(map(str, others)) == [f"{killed.path}: killed"]


def test_a_run_that_failed_in_one_experiment_and_finished_in_another_is_no_failed_one(make_run):
    done, _ = make_run(0.5), make_run(0.5, status="oom", experiment="before")
    lost = [make_run(0.5, seed=1, status="oom", experiment=name) for name in ("a", "b")]
    results, others = finished([done, *lost])
    assert [result.run for result in results] == [done]
    assert [(one.failed, one.status) for one in others] == [(True, "oom")]


SUMMARY, CONFIG = "summary.json", "config.yaml"
DAMAGE = {
    "a summary that was cut off": (SUMMARY, lambda text: text[: len(text) // 2], f"{SUMMARY}: "),
    "an empty summary": (SUMMARY, lambda text: "", f"{SUMMARY}: Expecting value"),
    "a summary that says little": (SUMMARY, lambda text: "{}", "do not say task, preset, clipping, "),
    "a status that was cut off": ("status.json", lambda text: text[:20], "status.json: "),
    "a config cut off between lines": (CONFIG, lambda text: text[: text.index("max_steps")], "max_steps"),
    "a config cut off within a line": (
        CONFIG,
        lambda text: text[: text.index("clipping") + 4],
        f"{CONFIG}: ",
    ),
    "an empty config": (CONFIG, lambda text: "", f"{CONFIG} holds no settings"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_named(make_run, name):
    file, change, told = DAMAGE[name]
    good, bad = make_run(0.5), make_run(0.5, clipping="norm")
    (bad.path / file).write_text(change((bad.path / file).read_text()))
    with pytest.raises(UserError) as refused:
        finished([good, bad])
    message = str(refused.value)
    assert message.startswith(f"the run {bad.path} cannot be used: ")
    assert message.endswith("Delete that folder, and make the run again")
    assert told in message
    assert "\n" not in message


MIXTURES = {
    "preset": (dict(preset="paper"), "mini", "paper"),
    "code version": (dict(code="badc0de"), "c0ffee", "badc0de"),
    "device": (dict(device="NVIDIA H200"), "cpu, x86_64", "NVIDIA H200"),
    "fingerprint of the data": (dict(settings={"fingerprint": "ab12"}), "None", "ab12"),
    "max_steps": (dict(settings={"max_steps": 80}), "40", "80"),
    "eval_every": (dict(settings={"eval_every": 5}), "10", "5"),
}


@pytest.mark.parametrize("what", MIXTURES)
def test_mixtures_are_refused(make_run, what):
    change, value, other_value = MIXTURES[what]
    one, other = make_run(0.5), make_run(0.5, clipping="norm", **change)
    results, _ = finished([one, other])
    with pytest.raises(
        UserError, match=f"these runs differ in their {what}: .* or with clipbench compare --allow-mixed"
    ) as refused:
        identify(results, allow_mixed=False)
    assert f"{value} in {one.path}" in str(refused.value)
    assert f"{other_value} in {other.path}" in str(refused.value)
    identify(results, allow_mixed=True)


def test_budgets_may_differ_between_tasks(make_run):
    longer = make_run(0.5, task="voc", settings={"max_steps": 80, "eval_every": 20})
    assert len({task for task, _ in labels([make_run(0.5), longer])}) == 2


def test_mixed_presets_and_data_are_told_apart(make_run):
    runs = [make_run(0.5), make_run(0.5, preset="paper"), make_run(0.5, settings={"fingerprint": "ab12cd34"})]
    assert [task for task, _ in labels(runs, allow_mixed=True)] == [
        "cola-mini data=genera",
        "cola-paper data=genera",
        "cola-mini data=ab12cd",
    ]


def test_two_runs_that_nothing_tells_apart_are_refused(make_run):
    runs = [make_run(0.5), make_run(0.6, settings={"preset.lr.adam": 0.7})]
    with pytest.raises(UserError, match=r"have seed 0 and differ only in preset\.lr\.adam"):
        labels(runs)
