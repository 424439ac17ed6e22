"""Where a run lies on disk: identity, status, lock, whole files. No other module names a result file.

A run folder is written by one process, in this order, while it holds the lock::

    with run.lock():
        run.start(config)            # or run.resume(step)
        run.append([record, ...])    # as often as wanted
        run.finish("ok", summary)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from experiments import locks
from experiments.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
STATUSES = ("running", "ok", "diverged", "oom", "error", "killed", "timeout")
FINISHED = ("ok", "diverged")
FAILED = ("oom", "error")

# What fingerprint reads: all of so many bytes, or the ends of so many files.
READ_WHOLE, SAMPLED_FILES, SAMPLED_BYTES = 256 * 2**20, 256, 512 * 2**10

# Top-level config keys that never change a number: where things lie, how often one looks, who runs it, and
# what the path already says (seed, names). `device` and `nproc` count through `device_type` and `world_size`.
NOT_IDENTITY = frozenset(
    (
        *("data_dir", "results_dir", "log_every", "logger", "quiet", "checkpoint_every", "keep"),
        *("force", "nproc", "device", "threads", "max_seconds", "hydra"),
        *("seed", "experiment", "names"),
    )
)
# And so at any depth: how many processes read the data decides neither its order nor what is drawn for it.
NOT_IDENTITY_ANYWHERE = frozenset(("data_dir", "num_workers"))


class RunLocked(UserError):
    """Another process works on this run."""


def digest(config: dict[str, Any]) -> str:
    """Name what changes the numbers of a run, its seed apart: 12 hex digits.

    Args:
        config: the resolved config, with `device_type`, `world_size` and `fingerprint` added and local paths
            replaced by fingerprints. Key order does not matter, and 1 is 1.0.
    """
    content = _canonical({"config": identity(config), "schema": SCHEMA_VERSION})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that changes the numbers of a run, its seed apart."""
    parts = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    if "seed" in config and parts.get("clipping", {}).get("seed") == config["seed"]:
        parts["clipping"] = _without(parts["clipping"], {"seed"})  # follows the run's seed
    return _without(parts, NOT_IDENTITY_ANYWHERE)


def _without(node: Any, dropped: Collection[str]) -> Any:
    if isinstance(node, dict):
        return {key: _without(value, dropped) for key, value in node.items() if key not in dropped}
    return [_without(value, dropped) for value in node] if isinstance(node, list | tuple) else node


def _canonical(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _canonical(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_canonical(value) for value in node]
    return int(node) if isinstance(node, float) and node.is_integer() else node


def fingerprint(files: Iterable[Path]) -> str | None:
    """Digest names, sizes and contents of files, wherever their common folder lies; None for no files.

    Note:
        Reads every byte of up to 256 MB in all. Beyond that, which at some 1 GB/s would hold up every launch,
        it reads the first and last 512 KB of at most 256 files, evenly spaced by name: an edit elsewhere that
        leaves every name and size as it was goes unseen.
    """
    # Not resolved: a hub cache links readable names to blobs, and the names are what the data is read by.
    paths = sorted({os.path.abspath(file) for file in files})
    if not paths:
        return None
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    sizes = [os.path.getsize(path) for path in paths]
    small = sum(sizes) <= READ_WHOLE
    read = paths if small else paths[:: math.ceil(len(paths) / SAMPLED_FILES)]
    contents = dict.fromkeys(paths)
    contents |= {path: _content(path, None if small else SAMPLED_BYTES) for path in read}
    total = hashlib.sha256()
    for path, size in zip(paths, sizes, strict=True):
        name = path.removeprefix(root).lstrip(os.sep)
        total.update(json.dumps([name, size, contents[path]]).encode())
    return total.hexdigest()[:16]


def _content(path: str, ends: int | None) -> str:
    """Digest of a file's content, or of its first and last bytes."""
    with open(path, "rb") as file:
        if ends is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(file.read(ends))
        file.seek(-min(ends, os.fstat(file.fileno()).st_size), os.SEEK_END)
        digest.update(file.read())
        return digest.hexdigest()


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` complete, on success only; until then the old one stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


class Run:
    """One run folder: config, status, metrics, summary, curves, and `checkpoints/ logs/ report/`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.curves_path = self.path / "curves.png"
        self.checkpoints_dir = self.path / "checkpoints"
        self.logs_dir = self.path / "logs"
        self.report_dir = self.path / "report"
        self._config_path = self.path / "config.yaml"
        self._status_path = self.path / "status.json"
        self._lines_path = self.path / "metrics.jsonl"
        self._table_path = self.path / "metrics.parquet"
        self._summary_path = self.path / "summary.json"
        self._lock_path = self.path / ".lock"

    @classmethod
    def locate(
        cls,
        results_dir: str | Path,
        *,
        experiment: str,
        task: str,
        preset: str,
        optimizer: str,
        clipping: str,
        digest: str,
        seed: int,
    ) -> Run:
        """Say where the run with this identity lies; nothing is created."""
        parts = (experiment, f"{task}-{preset}", f"{optimizer}-{clipping}", digest, f"seed={seed}")
        return cls(Path(results_dir, "runs", *_checked(parts)))

    @classmethod
    def locate_tails(
        cls, results_dir: str | Path, *, task: str, preset: str, weights: str, digest: str, seed: int
    ) -> Run:
        """Say where the gradient norms measured at these weights lie; nothing is created."""
        parts = (f"{task}-{preset}", weights, digest, f"seed={seed}")
        return cls(Path(results_dir, "tails", *_checked(parts)))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def names(self) -> dict[str, str]:
        """What the path says: `experiment task preset optimizer clipping digest seed`."""
        experiment, task, optimizer, digest, seed = ("", "", "", "", "", *self.path.absolute().parts)[-5:]
        names = {"experiment": experiment, "digest": digest, "seed": seed.removeprefix("seed=")}
        names["task"], _, names["preset"] = task.rpartition("-")
        names["optimizer"], _, names["clipping"] = optimizer.partition("-")
        return names

    @property
    def status(self) -> dict[str, Any] | None:
        """`{"status": one of STATUSES, "started", "pid", "host", "message", ...}`; None if never started."""
        status = _read_json(self._status_path)
        if status is None or status["status"] != "running" or locks.is_held(self._lock_path):
            return status
        # Nobody holds the lock now, but the run may have finished since its status was read.
        status = _read_json(self._status_path)
        return {**status, "status": "killed"} if status and status["status"] == "running" else status

    @property
    def attempt(self) -> str:
        """Name of what began with `start`, unlike any other's: 16 hex digits, the same after `resume`."""
        began = (_read_json(self._status_path) or {}).get("started")
        return hashlib.sha256(f"{self.names} {began}".encode()).hexdigest()[:16]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run alone, creating its folder; raises `RunLocked` if somebody else has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locks.hold(self._lock_path))
            except BlockingIOError:
                owner = _read_json(self._status_path) or {}
                who = f"process {owner['pid']} on {owner['host']}" if "pid" in owner else "another process"
                raise RunLocked(
                    f"{self.path} is being run by {who}. Wait for it, or stop it first."
                ) from None
            yield

    def delete(self) -> None:
        """Remove the folder, and those above that are empty then; raises `RunLocked` if somebody has it."""
        with self.lock():
            shutil.rmtree(self.path)
        for parent in self.path.parents[:4]:  # those that `locate` has named
            with contextlib.suppress(OSError):  # not empty
                parent.rmdir()

    def start(self, config: dict[str, Any], **facts: Any) -> None:
        """Begin from nothing: whatever an earlier attempt left here is removed.

        Args:
            config: the resolved config, plain containers and numbers.
            facts: kept in the status beside pid and host, such as code version and threads.
        """
        import yaml

        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.path.mkdir(parents=True, exist_ok=True)
        # The status goes first: without one the folder is no run, so a crash below leaves nothing half true.
        outputs = (
            self._status_path,
            self._summary_path,
            self._lines_path,
            self._table_path,
            self.curves_path,
        )
        for leftover in (*outputs, *self.path.glob(".*.tmp")):
            leftover.unlink(missing_ok=True)
        for folder in (self.checkpoints_dir, self.logs_dir, self.report_dir):
            if folder.exists():
                shutil.rmtree(folder)
        with write_whole(self._config_path) as file:
            file.write(text.encode())
        self._write_running({"started": _now(), **facts})

    def resume(self, step: int, **facts: Any) -> None:
        """Go on from the checkpoint of `step`: records up to and including it are kept, others dropped."""
        records = self.records()
        kept = records[records["step"] <= step] if len(records) else records
        previous = _read_json(self._status_path) or {}
        self._write_running({"started": previous.get("started", _now()), "resumed": _now(), **facts})
        with write_whole(self._lines_path) as file:
            file.write(_to_lines(kept.to_dict("records")))
        for leftover in (self._table_path, self._summary_path, self.curves_path, *self.path.rglob(".*.tmp")):
            leftover.unlink(missing_ok=True)

    def _write_running(self, facts: dict[str, Any]) -> None:
        _write_json(
            self._status_path,
            {"status": "running", "pid": os.getpid(), "host": socket.gethostname(), **facts},
        )

    def checkpoint_path(self, name: str) -> Path:
        """Where the checkpoint of this name lies, if there is one."""
        return self.checkpoints_dir / f"{name}.pt"

    @contextlib.contextmanager
    def write_checkpoint(self, name: str) -> Iterator[BinaryIO]:
        """Open a checkpoint that replaces one of its name on success; its records reach the disk first."""
        if self._lines_path.exists():
            with self._lines_path.open("ab") as file:
                os.fsync(file.fileno())
        self.checkpoints_dir.mkdir(exist_ok=True)
        with write_whole(self.checkpoint_path(name)) as file:
            yield file

    def drop_checkpoints(self, *, but: str) -> None:
        """Remove all checkpoints but the one of this name, and their folder if it is left empty."""
        for path in self.checkpoints_dir.glob("*.pt"):
            if path != self.checkpoint_path(but):
                path.unlink()
        with contextlib.suppress(OSError):  # never made, or not empty
            self.checkpoints_dir.rmdir()

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add records (`step`, then metrics by name; absent is missing) so that SIGKILL cannot lose them."""
        with self._lines_path.open("ab") as file:
            file.write(_to_lines(records))

    def finish(self, status: str, summary: dict[str, Any], message: str | None = None) -> None:
        """Close the run: metrics to one table, then the summary, then the status, which makes it true."""
        if status not in STATUSES or status == "running":
            raise ValueError(f"status must be one of {', '.join(STATUSES[1:])}, got {status!r}")
        if self._lines_path.exists():
            table = self.records()
            with write_whole(self._table_path) as file:
                table.to_parquet(file, index=False)
            self._lines_path.unlink()
        _write_json(self._summary_path, summary)
        started = _read_json(self._status_path) or {}
        _write_json(self._status_path, {**started, "status": status, "message": message, "finished": _now()})

    def config(self) -> dict[str, Any]:
        """Return the resolved config the run was started with; empty if never started."""
        import yaml

        if not self._config_path.exists():
            return {}
        # The same parser in C, ten times as fast, wherever PyYAML was built with it.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        with _reading(self._config_path, yaml.YAMLError):
            config = yaml.load(self._config_path.read_bytes(), loader)
        if not isinstance(config, dict):
            raise unusable(self, "config.yaml holds no settings")
        return config

    def summary(self) -> dict[str, Any]:
        """Return what `finish` was given; empty before that."""
        return _read_json(self._summary_path) or {}

    def records(self) -> pd.DataFrame:
        """Return all records, one row each, missing values NaN; of a live run those written so far."""
        import pandas as pd

        # The table wins: where both are there, a finishing run died before it could remove the lines.
        lines = [] if self._table_path.exists() else self._whole_lines()
        if self._table_path.exists():  # asked again, since a live run may have finished in between
            with _reading(self._table_path):
                return pd.read_parquet(self._table_path)
        with _reading(self._lines_path):
            return pd.DataFrame([json.loads(line) for line in lines])

    def last_step(self) -> int | None:
        """Return the step that the run reached, reading no more than needed; None if it made no record."""
        if "steps" in (summary := self.summary()):
            return summary["steps"]
        if lines := self._whole_lines():
            return json.loads(lines[-1])["step"]
        records = self.records()
        return int(records["step"].max()) if len(records) else None

    def _whole_lines(self) -> list[bytes]:
        try:
            content = self._lines_path.read_bytes()
        except FileNotFoundError:
            return []
        return content.split(b"\n")[:-1]  # what follows the last newline was cut off by a kill


def unusable(run: Run, why: str) -> UserError:
    """What to say of a run whose files are damaged, or lack something."""
    return UserError(f"the run {run.path} cannot be used: {why}. Delete that folder, and make the run again")


def find_unstarted(root: str | Path) -> list[Run]:
    """Return the folders at and below a folder that processes made for runs and left before these began."""
    folders = [
        folder for folder, _, files in os.walk(root) if ".lock" in files and "status.json" not in files
    ]
    return [Run(folder) for folder in sorted(folders) if not locks.is_held(Path(folder, ".lock"))]


def _checked(parts: Iterable[str]) -> tuple[str, ...]:
    for part in (parts := tuple(parts)):
        if not re.fullmatch(r"[\w=+][\w.=+-]*", part):
            raise UserError(f"A name in a run's path must be letters, digits and _.=+-, got {part!r}.")
    return parts


def find_checkpoint(path: str | Path) -> tuple[Path, Run]:
    """Return a checkpoint, and the run that it is of.

    Args:
        path: of the file; or of its run, whose best checkpoint is taken, or the last where there is no best.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    inside = [Run(path).checkpoint_path(name) for name in ("best", "last")]
    for file in (path, *inside):
        if file.is_file():
            return file, Run(file.absolute().parents[1])
    if Run(path).status is not None:
        raise UserError(f"the run {path} has kept no checkpoint; keep=best or keep=last keeps one")
    raise UserError(f"checkpoint must be a run's folder, or a file in its checkpoints/: there is no {path}")


def find_runs(root: str | Path) -> list[Run]:
    """Return the runs at and below a folder, by path, seeds in numerical order."""
    runs = []
    for folder, below, files in os.walk(root):
        if "status.json" in files:
            runs.append(Run(folder))
            below.clear()
    return sorted(runs, key=_by_path_then_seed)


def load_records(runs: Iterable[Run], columns: Sequence[str]) -> pd.DataFrame:
    """Return these columns of the records of finished runs as one table, `run` their place among ``runs``.

    What a run has not recorded is NaN.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    types = {**dict.fromkeys(columns, pa.float64()), "run": pa.int64()}
    tables = [pa.schema(types).empty_table()]
    for place, run in enumerate(runs):
        with _reading(run._table_path), ParquetFile(run._table_path, memory_map=True) as file:
            # Files are small: handing them to threads takes longer than reading them.
            there = [name for name in columns if name in file.schema_arrow.names]
            table = file.read(there, use_threads=False)
        tables.append(table.append_column("run", pa.repeat(pa.scalar(place, pa.int64()), len(table))))
    return pa.concat_tables(tables, promote_options="permissive").to_pandas()


def _by_path_then_seed(run: Run) -> tuple[tuple[str, ...], list[str | int]]:
    # Splitting at digits alternates text and numbers, so that seed=10 comes after seed=9.
    *parents, name = run.path.parts
    return tuple(parents), [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Around what reads a file of a run; what a parser raises of one that was cut off becomes a message."""
    try:
        yield
    except (ValueError, OSError, *errors) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # Arrow's have none
            raise
        raise unusable(Run(path.parent), f"{path.name}: {' '.join(str(error).split())}") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    with _reading(path):
        return json.loads(content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, default=methodcaller("item")) + "\n"
    with write_whole(path) as file:
        file.write(text.encode())


def _to_lines(records: Iterable[dict[str, Any]]) -> bytes:
    # Python's JSON writes NaN and Infinity and reads them back; scalars of NumPy and torch become numbers.
    return "".join(json.dumps(record, default=methodcaller("item")) + "\n" for record in records).encode()
