"""Copies for TensorBoard, Weights & Biases and MLflow: what is in them, and that no run depends on them."""

from __future__ import annotations

import errno
import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import runs
from experiments.runs import Run, find_runs
from experiments.training import loggers
from experiments.training.loggers import CPU, Dispensable, Logger
from experiments.training.presets import conf_dir
from experiments.training.state import random_state

RUN = ["run", "task=quadratic", "max_steps=30", "eval_every=10", "log_every=3", "quiet=true", "keep=all"]
SETTINGS = {"tensorboard": [], "wandb": ["logger.mode=offline"], "mlflow": []}
BACKENDS = list(SETTINGS)

Copy = dict[tuple[str, int], list[float]]
"""Values by metric and step; more than one where a step is doubled."""


def chosen(backend: str) -> list[str]:
    return [f"logger={backend}", *SETTINGS[backend]]


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch):
    """Nothing of whoever runs the tests, no word to the makers, and nothing left for other tests."""
    for name in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def the_run(root: str = "results") -> Run:
    (run,) = find_runs(root)
    return run


# Read back


def tensorboard(run: Run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run.logs_dir), size_guidance={"scalars": 0}).Reload()


def wandb_records(file: Path) -> Iterator:
    """Messages of a .wandb file: after seven bytes LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if left < 7 or kind == 0:
            place += left
            continue
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(b"".join(parts))
            parts = []


def wandb_files(run: Run) -> list[Path]:
    """One for each process of the run, once W&B's own process, which writes behind, is done with the last."""
    deadline = time.monotonic() + 30
    while True:
        files = sorted(
            run.logs_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime
        )
        if files and any(record.HasField("exit") for record in wandb_records(files[-1])):
            return files
        assert time.monotonic() < deadline, f"{files} not finished"
        time.sleep(0.1)


def wandb_values(updates) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def mlflow(run: Run):
    """A client, and the runs that it finds."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(str(run.path.parents[5] / "mlruns"))
    (experiment,) = client.search_experiments(filter_string="name = 'clipbench'")
    return client, client.search_runs([experiment.experiment_id])


def copy_of(run: Run, backend: str) -> Copy:
    """All that the backend holds of the run's records."""
    copy: Copy = defaultdict(list)
    if backend == "tensorboard":
        events = tensorboard(run)
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                copy[name, event.step].append(event.value)
    elif backend == "wandb":
        for file in wandb_files(run):
            for record in wandb_records(file):
                values = wandb_values(record.history.item)
                for name in values:
                    if not name.startswith("_"):
                        copy[name, values["_step"]].append(values[name])
    else:
        client, (found,) = mlflow(run)
        for name in found.data.metrics:
            for point in client.get_metric_history(found.info.run_id, name):
                copy[name, point.step].append(point.value)
    return {place: values for place, values in copy.items() if not place[0].startswith("best/")}


def written(run: Run) -> Copy:
    """The same of the run's own file; the epoch of an evaluation's step is there twice."""
    values: dict[tuple[str, int], list[float]] = {}
    for record in run.records().to_dict("records"):
        step = int(record.pop("step"))
        values |= {(name, step): [value] for name, value in record.items() if not pd.isna(value)}
    return values


def expect_copied(run: Run, backend: str) -> None:
    copy, own = copy_of(run, backend), written(run)
    if backend != "wandb":  # which merges what has one step
        for step in (10, 20, 30):
            assert len(copy["epoch", step]) == 2
            copy["epoch", step].pop()
    assert copy.keys() == own.keys()
    for place, values in own.items():
        assert copy[place] == pytest.approx(values, rel=1e-6), place  # TensorBoard keeps float32


# What is in a copy


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_holds_every_record_the_settings_and_the_end(backend, clipbench, capfd):
    assert clipbench(*RUN, *chosen(backend)) == 0
    assert capfd.readouterr().err == ""
    run = the_run()
    expect_copied(run, backend)
    best = run.summary()["best"]
    if backend == "tensorboard":
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        events = tensorboard(run)
        content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        params = HParamsPluginData.FromString(content).session_start_info.hparams
        assert (params["clipping.threshold"].number_value, params["optimizer.lr"].number_value) == (1, 0.03)
        assert params["task.noise"].string_value == "student"
        assert events.Tensors("status/text_summary")[0].tensor_proto.string_val == [b"ok"]
        (value,) = events.Scalars("best/loss")
        assert (value.value, value.step) == (pytest.approx(best["value"]), 30)
    elif backend == "wandb":
        (file,) = wandb_files(run)
        records = list(wandb_records(file))
        (begin,) = [record.run for record in records if record.HasField("run")]
        assert (begin.project, begin.run_id) == ("clipbench", run.attempt)
        assert begin.display_name == "quadratic-mini sgd-norm seed=0"
        settings = wandb_values(begin.config.update)
        assert (settings["clipping"]["threshold"], settings["seed"]) == (1, 0)
        end = {k: v for record in records for k, v in wandb_values(record.summary.update).items()}
        assert (end["status"], end["best/loss"], end["best/step"]) == ("ok", best["value"], best["step"])
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    else:
        _, (found,) = mlflow(run)
        assert (found.info.status, found.data.tags["clipbench.status"]) == ("FINISHED", "ok")
        assert found.info.run_name == "quadratic-mini sgd-norm seed=0"
        assert (found.data.params["clipping.threshold"], found.data.params["seed"]) == ("1.0", "0")
        assert (found.data.metrics["best/loss"], found.data.metrics["best/step"]) == tuple(best.values())[
            ::-1
        ]


def test_mlflow_is_given_no_more_than_a_server_takes_at_once(clipbench, monkeypatch):
    from mlflow.tracking import MlflowClient

    log_batch, sizes = MlflowClient.log_batch, []

    def counted(client, run_id, metrics=(), params=()):
        sizes.append((len(metrics), len(params)))
        log_batch(client, run_id, metrics, params)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    monkeypatch.setattr(loggers, "MOST_PARAMS", 10)
    assert clipbench(*RUN[:2], "max_steps=300", "eval_every=300", "log_every=300", "logger=mlflow") == 0
    assert sum(name == "train/loss" for name, _ in copy_of(the_run(), "mlflow")) == 300
    assert sum(metrics for metrics, _ in sizes) > 2000
    assert [max(each) for each in zip(*sizes, strict=True)] == [1000, 10]


def test_mlflow_writes_where_the_uri_says(clipbench, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "from_environment"))
    assert clipbench(*RUN, "logger=mlflow") == 0
    assert clipbench(*RUN, "logger=mlflow", "force=true", f"logger.tracking_uri=file://{tmp_path}/asked") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"from_environment", "asked", "results"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"runs"}


# A run that goes on


KILLED_AT_STEP_17 = """
import os, signal, sys
from experiments import cli
from experiments.tasks.quadratic import Quadratic

forward, steps = Quadratic.forward, []

def forwarded(task, model, batch):
    steps.append(1)
    if len(steps) == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(task, model, batch)

Quadratic.forward = forwarded
cli._dispatch(sys.argv[1:])
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_run_goes_on_in_its_copy_and_doubles_no_step(backend, clipbench, tmp_path):
    argv = [*RUN, *chosen(backend)]
    # Not with this process's service of W&B, which would hold the dead one's run.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_17, *argv], check=False, env=env)
    assert killed.returncode == -9
    run = the_run()
    attempt = run.attempt
    assert torch.load(run.checkpoint_path("last"), weights_only=True)["step"] == 10
    if backend != "wandb":  # whose own process has to hear of it first
        assert max(step for _, step in copy_of(run, backend)) == 15
    time.sleep(1)  # as any other process would take to begin; TensorBoard orders its files by the second
    assert clipbench(*argv) == 0
    assert run.attempt == attempt
    if backend == "wandb":
        first, second = wandb_files(run)
        ids = {r.run.run_id for file in (first, second) for r in wandb_records(file) if r.HasField("run")}
        assert ids == {attempt}
        steps = [wandb_values(r.history.item).get("_step") for r in wandb_records(second)]
        assert [step for step in steps if step is not None] == list(range(11, 31))
    else:
        expect_copied(run, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_begun_anew_has_a_copy_of_its_own(backend, clipbench, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_now", lambda: "2020-02-02T02:02:02+00:00")
        assert clipbench(*RUN, *chosen(backend)) == 0
    run = the_run()
    attempt = run.attempt
    assert clipbench(*RUN, *chosen(backend), "force=true") == 0
    assert run.attempt != attempt
    if backend == "mlflow":
        _, found = mlflow(run)
        assert {each.data.tags["clipbench.attempt"] for each in found} == {attempt, run.attempt}
    else:
        expect_copied(run, backend)


# The run does not depend on it


def test_no_number_and_no_identity_depends_on_the_logger(clipbench):
    outcomes = {}
    for name in ("none", *BACKENDS):
        settings = SETTINGS.get(name, [])
        argv = [f"logger={name}", *settings, f"results_dir={name}", "clipping=linear_rand_norm"]
        assert clipbench(*RUN, *argv) == 0
        run = the_run(name)
        saved = torch.load(run.checkpoint_path("last"), weights_only=True)["state"]
        outcomes[name] = (run, saved)
    run, saved = outcomes.pop("none")
    for other, found in outcomes.values():
        assert other.path.parts[-6:] == run.path.parts[-6:]
        pd.testing.assert_frame_equal(other.records(), run.records(), check_exact=True)
        assert torch.equal(found["model"]["x"], saved["model"]["x"])
        mine, theirs = (state["of_rank"][0]["random"] for state in (found, saved))
        assert torch.equal(mine["torch"], theirs["torch"])
        assert (mine["python"], mine["numpy"]) == (theirs["python"], theirs["numpy"])


class Drawing(Logger):
    """Draws from every global generator wherever it can, as a library may."""

    def open(self, *args):
        random.random(), np.random.random(), torch.rand(())  # noqa: NPY002

    log = finish = close = open


def test_what_a_logger_draws_shifts_nothing():
    before = random_state(CPU)
    logger = Dispensable(Drawing())
    for call in (lambda: logger.open(None, {}, 0), lambda: logger.log([]), lambda: logger.finish({})):
        call()
    logger.close()
    after = random_state(CPU)
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before == after


def test_a_finished_run_is_finished_for_every_logger(clipbench, capsys):
    assert clipbench(*RUN) == 0
    assert clipbench(*RUN, "logger=tensorboard") == 0
    assert "already ok" in capsys.readouterr().out
    assert not the_run().logs_dir.exists()


def test_what_is_not_chosen_is_not_imported(tmp_path):
    code = (
        "import sys; from experiments import cli\n"
        "assert cli._dispatch(sys.argv[1:]) == 0\n"
        "found = {name.split('.')[0] for name in sys.modules} | set(sys.modules)\n"
        "print(sorted({'tensorboard', 'torch.utils.tensorboard', 'wandb', 'mlflow'} & found))"
    )
    for settings, imported in ([], []), (["logger=mlflow", "force=true"], ["mlflow"]):
        argv = [sys.executable, "-c", code, *RUN, *settings]
        told = subprocess.run(argv, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
        assert told.splitlines()[-1] == str(imported)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_package_is_named_with_its_extra(backend, clipbench, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, backend, None)
    assert clipbench(*RUN, *chosen(backend)) == 2
    told = capsys.readouterr().err
    assert f"needs {backend}, which the extra 'loggers'" in told
    assert "pip install '.[loggers]'" in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_no_package(clipbench, monkeypatch, capsys, tmp_path):
    (tmp_path / "elsewhere" / "wandb").mkdir(parents=True)  # as W&B itself leaves them
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    from experiments.errors import UserError
    from experiments.training.loggers import WandB

    with pytest.raises(UserError, match="this logger needs wandb"):
        WandB()


def test_bad_settings_are_refused(clipbench, capsys, tmp_path):
    for setting, message in {
        "logger=wandbb": "there is no logger 'wandbb'; choose one of mlflow, none, tensorboard, wandb.",
        "logger.mode=onlin": "logger.mode must be online or offline, or null for what WANDB_MODE says, got",
        "logger.projekt=x": "the settings of wandb are project, entity, mode. Did you mean 'project'?",
    }.items():
        logger = [] if setting.startswith("logger=") else ["logger=wandb"]
        assert clipbench(*RUN, *logger, setting) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Failures

FAILING = {
    "tensorboard": ("torch.utils.tensorboard.SummaryWriter", "flush"),
    "wandb": ("wandb.Run", "log"),
    "mlflow": ("mlflow.tracking.MlflowClient", "log_batch"),
}
OPENING = {
    "tensorboard": ("torch.utils.tensorboard.SummaryWriter", "__init__"),
    "wandb": ("wandb", "init"),
    "mlflow": ("mlflow.tracking.MlflowClient", "create_run"),
}


@pytest.mark.parametrize("place", [FAILING, OPENING], ids=["in training", "at the start"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failing_logger_costs_one_warning_and_not_the_run(backend, place, clipbench, monkeypatch, capsys):
    owner, method = place[backend]
    module, _, name = owner.rpartition(".")
    target = getattr(importlib.import_module(module), name) if module else importlib.import_module(name)
    calls, works = [], 0 if place is OPENING else 5

    def failing(*args, **settings):
        calls.append(1)
        if len(calls) > works:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*args, **settings)

    whole = getattr(target, method)
    monkeypatch.setattr(target, method, failing)
    assert clipbench(*RUN, *chosen(backend)) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("clipbench: warning: ")
    assert "failed and gets no more of this run" in warning
    assert "No space left on device" in warning
    assert len(calls) == works + 1
    run = the_run()
    assert run.status["status"] == "ok"
    assert run.records()["lr"].count() == 30


@pytest.mark.parametrize("end", ["SIGTERM", "error", "disk"])
def test_a_run_that_ends_otherwise_says_so_and_lets_go(end, clipbench, monkeypatch):
    from experiments.tasks.quadratic import Quadratic

    forward, steps = Quadratic.forward, []

    def forwarded(task, model, batch):
        steps.append(1)
        if len(steps) == 15:
            if end == "SIGTERM":
                os.kill(os.getpid(), 15)
            elif end == "error":
                raise RuntimeError("no such luck")
            else:
                monkeypatch.setattr(Run, "append", full_disk)
        return forward(task, model, batch)

    def full_disk(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Quadratic, "forward", forwarded)
    assert clipbench(*RUN, "logger=mlflow") != 0
    _, (found,) = mlflow(the_run())
    assert found.info.status == {"SIGTERM": "KILLED", "error": "FAILED", "disk": "KILLED"}[end]
    told = {"SIGTERM": "killed", "error": "error", "disk": None}[end]  # the last says nothing, and goes on
    assert found.data.tags.get("clipbench.status") == told


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_of_several_processes_the_first_alone_makes_a_copy(clipbench, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert clipbench(*RUN, "logger=tensorboard", "nproc=2") == 0
    run = the_run()
    assert len(list(run.logs_dir.iterdir())) == 1
    expect_copied(run, "tensorboard")


def test_every_logger_is_listed_and_has_its_file(clipbench, capsys):
    assert clipbench("list", "logger") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"none", *BACKENDS}
    assert {path.stem for path in (conf_dir() / "logger").glob("*.yaml")} == {"none", *BACKENDS}
    assert all(len(line.split()) > 2 for line in lines)
