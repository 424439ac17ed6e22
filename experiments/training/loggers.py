"""Copies of a run's records for TensorBoard, Weights & Biases or MLflow, imported only when chosen."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.errors import UserError, nearest
from experiments.runs import FINISHED, Run
from experiments.training.recorder import Record
from experiments.training.state import random_state, set_random_state

CPU = torch.device("cpu")


class Logger:
    """Keeps no copy, and says what those that do are asked for; only the first process asks."""

    def open(self, place: Run, config: dict[str, Any], step: int) -> None:
        """Begin a copy, or go on with that of an earlier attempt.

        Args:
            place: the run.
            config: resolved, with all that names the run.
            step: that the run goes on after; 0 at its beginning.
        """

    def log(self, records: list[Record]) -> None:
        """Copy records, which are in the run's folder already."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Say what the run came to."""

    def close(self) -> None:
        """Let go; without ``finish`` the run was interrupted."""


class Dispensable(Logger):
    """A logger whose failure (a disk, a server, a login) costs a warning and the rest of the copy.

    Nor does it shift what is drawn: MLflow, for one, draws now and then from Python's global generator.

    Args:
        logger: that may fail.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger

    def open(self, place: Run, config: dict[str, Any], step: int) -> None:
        self._try(lambda: self._logger.open(place, config, step))

    def log(self, records: list[Record]) -> None:
        self._try(lambda: self._logger.log(records))

    def finish(self, summary: dict[str, Any]) -> None:
        self._try(lambda: self._logger.finish(summary))

    def close(self) -> None:
        self._try(self._logger.close)

    def _try(self, call: Callable[[], None]) -> None:
        if type(self._logger) is Logger:
            return
        before = random_state(CPU)
        try:
            call()
        except Exception as error:
            name, self._logger = type(self._logger).__name__, Logger()
            told = " ".join(f"{type(error).__name__}: {error}".split())
            print(
                f"clipbench: warning: {name} failed and gets no more of this run, whose own records go on: "
                f"{told}",
                file=sys.stderr,
            )
        finally:
            set_random_state(before, CPU)


class TensorBoard(Logger):
    """Writes events into the run's folder; what was written after the step to go on from is hidden."""

    def __init__(self) -> None:
        _look_for("tensorboard")

    def open(self, place: Run, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(place.logs_dir, purge_step=step + 1 if step else None)
        if not step:
            # Not SummaryWriter.add_hparams, which makes a run of its own beside this one.
            _, begin, _ = hparams(_flat(config), {})
            self._writer.file_writer.add_summary(begin)

    def log(self, records: list[Record]) -> None:
        for record in records:
            for name, value in _values(record):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()  # a killed process would lose what is not written

    def finish(self, summary: dict[str, Any]) -> None:
        self._writer.add_text("status", summary["status"], summary["steps"])
        for name, value in _best(summary).items():
            self._writer.add_scalar(name, value, summary["steps"])

    def close(self) -> None:
        self._writer.close()


MODES = ("online", "offline")


class WandB(Logger):
    """Writes a run of Weights & Biases; one that goes on leaves out the steps that the server has.

    Args:
        project: that the run belongs to.
        entity: user or team that the project belongs to; None for whoever is logged in.
        mode: ``online`` or ``offline``; None for what ``WANDB_MODE`` says, or else online.
    """

    def __init__(
        self, project: str = "clipbench", entity: str | None = None, mode: str | None = None
    ) -> None:
        if mode is not None and mode not in MODES:
            raise UserError(
                f"logger.mode must be {' or '.join(MODES)}, or null for what WANDB_MODE says, got {mode!r}."
                f"{nearest(str(mode), MODES)}"
            )
        _look_for("wandb")
        self._options = {"project": project, "entity": entity, "mode": mode}
        self._exit_code = 1

    def open(self, place: Run, config: dict[str, Any], step: int) -> None:
        import wandb

        place.logs_dir.mkdir(exist_ok=True)  # or it would take another folder
        self._run = wandb.init(
            **self._options,
            id=place.attempt,
            name=_title(place),
            group=place.names["digest"],  # its runs differ in the seed alone
            dir=place.logs_dir.absolute(),  # its service may run in another folder
            config=config,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=config["quiet"]),
        )

    def log(self, records: list[Record]) -> None:
        for record in records:
            self._run.log(dict(_values(record)), step=record["step"])

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update({"status": summary["status"], **_best(summary)})
        self._exit_code = 0 if summary["status"] in FINISHED else 1

    def close(self) -> None:
        self._run.finish(exit_code=self._exit_code)


# What MLflow takes at once.
MOST_METRICS, MOST_PARAMS = 1000, 100


class MLflow(Logger):
    """Writes a run of MLflow; one that goes on leaves out the steps that are there.

    Args:
        tracking_uri: of a server or a folder; None for what ``MLFLOW_TRACKING_URI`` says, or else ``mlruns``
            in the folder of results.
        experiment: of MLflow's, that the run belongs to.
    """

    def __init__(self, tracking_uri: str | None = None, experiment: str = "clipbench") -> None:
        _look_for("mlflow")
        self._uri = tracking_uri
        self._experiment = experiment
        self._logged: dict[str, int] = {}
        """Last step there of each metric."""
        self._status = "KILLED"

    def open(self, place: Run, config: dict[str, Any], step: int) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = uri or str(Path(config["results_dir"], "mlruns").absolute())
        if "://" not in uri or uri.startswith("file:"):
            # MLflow still reads and writes folders, but wants to be told that one is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment_id()
        tags = {"clipbench.attempt": place.attempt}
        if step:
            found = self._client.search_runs([experiment], f"tags.`clipbench.attempt` = '{place.attempt}'")
            if found:
                return self._go_on(found[0].info.run_id)
        self._id = self._client.create_run(experiment, tags=tags, run_name=_title(place)).info.run_id
        params = [Param(name, str(value)) for name, value in _flat(config).items()]
        for some in _batches(params, MOST_PARAMS):
            self._client.log_batch(self._id, params=some)

    def log(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, record["step"])
            for record in records
            for name, value in _values(record)
            if record["step"] > self._logged.get(name, 0)
        ]
        for some in _batches(metrics, MOST_METRICS):
            self._client.log_batch(self._id, metrics=some)

    def finish(self, summary: dict[str, Any]) -> None:
        for name, value in _best(summary).items():
            self._client.log_metric(self._id, name, value, step=summary["steps"])
        self._client.set_tag(self._id, "clipbench.status", summary["status"])
        failed = "FAILED" if summary["status"] in ("oom", "error") else "KILLED"
        self._status = "FINISHED" if summary["status"] in FINISHED else failed

    def close(self) -> None:
        self._client.set_terminated(self._id, self._status)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        for _ in range(2):  # another run may make it between the two
            if found := self._client.get_experiment_by_name(self._experiment):
                return found.experiment_id
            try:
                return self._client.create_experiment(self._experiment)
            except MlflowException as error:
                refused = error
        raise refused

    def _go_on(self, run_id: str) -> None:
        self._id = run_id
        for name in self._client.get_run(run_id).data.metrics:
            self._logged[name] = max(point.step for point in self._client.get_metric_history(run_id, name))
        self._client.update_run(run_id, status="RUNNING")


def _look_for(package: str) -> None:
    """Refuse to begin without ``package``, which is not imported here."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # without one it is but a folder of that name
        raise UserError(
            f"this logger needs {package}, which the extra 'loggers' of torch-clip brings: "
            "pip install '.[loggers]' in the clone; logger=none needs nothing"
        )


def _title(place: Run) -> str:
    """What a person reads in a list of runs."""
    names = place.names
    return f"{names['task']}-{names['preset']} {names['optimizer']}-{names['clipping']} seed={names['seed']}"


def _values(record: Record) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in record.items() if name != "step")


def _best(summary: dict[str, Any]) -> dict[str, float]:
    """Best evaluation and its step, if there was one."""
    best = summary["best"]
    return {f"best/{summary['metric']}": best["value"], "best/step": best["step"]} if best else {}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings by dotted name; what is no number and no text is given as Python would write it."""
    settings: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            settings |= _flat(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value if isinstance(value, int | float | str) else str(value)
    return settings


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
