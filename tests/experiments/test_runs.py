"""The run folder: identity, lock, status, whole files."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import runs
from experiments.runs import Run, RunLocked, digest, find_runs, fingerprint, load_records, write_whole

CONFIG = {
    "seed": 0,
    "max_steps": 40,
    "log_every": 10,
    "data_dir": None,
    "results_dir": "results",
    "task": {"_target_": "tasks.Cola", "batch_size": 16, "num_workers": 0, "data_dir": None},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "betas": [0.9, 0.99]},
    "clipping": {"_target_": "torch_clip.methods.AutoClip", "percentile": 0.75, "seed": 11},
    "device_type": "cpu",
    "world_size": 1,
    "fingerprint": None,
}
NAMES = dict(experiment="adhoc", task="cola", preset="mini", optimizer="sgd", clipping="auto_clip")


def changed(path: str, value: object) -> dict:
    """CONFIG with the value at a dotted path replaced."""
    config = json.loads(json.dumps(CONFIG))
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


@pytest.fixture
def run(tmp_path):
    return Run.locate(tmp_path, **NAMES, digest="0123456789ab", seed=3)


class TestDigest:
    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("seed", 7),
            ("log_every", 1),
            ("data_dir", "/elsewhere"),
            ("results_dir", "/elsewhere"),
            ("task.data_dir", "/elsewhere"),
            ("task.num_workers", 8),
            ("keep", 5),
            ("checkpoint_every", 3),
            ("max_seconds", 60),
            ("nproc", 2),
            ("hydra", {"launcher": "joblib"}),
            ("optimizer.betas", (0.9, 0.99)),
            ("world_size", 1.0),
        ],
    )
    def test_is_blind_to_what_changes_no_number(self, path, value):
        assert digest(changed(path, value)) == digest(CONFIG)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("optimizer.lr", 0.2),
            ("clipping.percentile", 0.5),
            ("clipping._target_", "torch_clip.methods.NormClip"),
            ("max_steps", 41),
            ("task.batch_size", 32),
            ("task.seed", 5),
            ("clipping.seed", 12),
            ("device_type", "cuda"),
            ("world_size", 2),
            ("fingerprint", "abc"),
            ("precision", "bf16"),
            ("compile", True),
            ("accumulate", 2),
            ("optimizer.betas", [0.99, 0.9]),
        ],
    )
    def test_sees_what_changes_the_numbers(self, path, value):
        assert digest(changed(path, value)) != digest(CONFIG)

    def test_a_clipping_seed_that_follows_the_runs_seed_is_not_counted(self):
        following = [changed("clipping.seed", seed) | {"seed": seed} for seed in (1, 2)]
        assert digest(following[0]) == digest(following[1])

    def test_is_blind_to_key_order(self):
        backwards = dict(reversed(CONFIG.items()))
        backwards["task"] = dict(reversed(CONFIG["task"].items()))
        assert digest(backwards) == digest(CONFIG)

    def test_counts_the_schema_version(self, monkeypatch):
        before = digest(CONFIG)
        monkeypatch.setattr(runs, "SCHEMA_VERSION", runs.SCHEMA_VERSION + 1)
        assert digest(CONFIG) != before

    def test_is_twelve_hex_digits(self):
        assert len(digest(CONFIG)) == 12
        assert int(digest(CONFIG), 16) >= 0

    def test_refuses_what_has_no_canonical_form(self):
        with pytest.raises(TypeError):
            digest({"task": object()})


class TestFingerprint:
    @pytest.fixture
    def files(self, tmp_path):
        folder = tmp_path / "here"
        for name, text in {"train.tsv": "a b", "sub/dev.tsv": "c"}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        return [folder / "train.tsv", folder / "sub/dev.tsv"]

    def test_is_blind_to_the_place_the_order_and_the_time(self, files, tmp_path):
        shutil.copytree(tmp_path / "here", tmp_path / "far/away")
        moved = [tmp_path / "far/away/sub/dev.tsv", tmp_path / "far/away/train.tsv"]
        os.utime(moved[0], (0, 0))
        assert fingerprint(moved) == fingerprint(files)

    def test_is_blind_to_how_a_path_is_spelt(self, files, tmp_path, monkeypatch):
        before = fingerprint(files)
        monkeypatch.chdir(tmp_path)
        relative = [file.relative_to(tmp_path) for file in files]
        assert fingerprint(relative) == before
        assert fingerprint(files + relative) == before

    def test_sees_content(self, files):
        before = fingerprint(files)
        files[0].write_text("a c")
        assert fingerprint(files) != before

    def test_sees_names(self, files):
        before = fingerprint(files)
        files[1] = files[1].rename(files[1].with_name("test.tsv"))
        assert fingerprint(files) != before

    def test_keeps_contents_with_their_names(self, files):
        before = fingerprint(files)
        first, second = files[0].read_text(), files[1].read_text()
        files[0].write_text(second)
        files[1].write_text(first)
        assert fingerprint(files) != before

    def test_of_nothing_is_none(self):
        assert fingerprint([]) is None

    def test_of_very_much_reads_the_ends_of_some_files_only(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runs, "READ_WHOLE", 200)
        monkeypatch.setattr(runs, "SAMPLED_FILES", 4)
        monkeypatch.setattr(runs, "SAMPLED_BYTES", 10)
        files = [tmp_path / f"{i}.jpg" for i in range(10)]
        for file in files:
            file.write_bytes(b"x" * 30)
        opened = []
        real = open
        monkeypatch.setattr(
            "builtins.open", lambda path, *args: opened.append(str(path)) or real(path, *args)
        )
        before = fingerprint(files)
        assert len(opened) == 4  # of 10: of every third

        def seen(change) -> bool:
            contents = [file.read_bytes() for file in files]
            change()
            after = fingerprint(tmp_path.glob("*.jpg"))
            for path in tmp_path.glob("*.jpg"):
                path.unlink()
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            assert fingerprint(files) == before
            return after != before

        assert seen(lambda: files[3].write_bytes(b"y" + b"x" * 29))  # the head of one that is read
        assert seen(lambda: files[3].write_bytes(b"x" * 29 + b"y"))  # its tail
        assert seen(lambda: files[1].write_bytes(b"x" * 31))  # the size of any
        assert seen(lambda: files[1].rename(tmp_path / "1a.jpg"))  # the name of any
        assert seen(lambda: files[1].unlink())
        assert not seen(lambda: files[3].write_bytes(b"x" * 15 + b"y" + b"x" * 14))  # as documented


class TestPlace:
    def test_is_the_documented_one(self, run, tmp_path):
        expected = "runs/adhoc/cola-mini/sgd-auto_clip/0123456789ab/seed=3"
        assert run.path == tmp_path / expected
        assert run.names == {**NAMES, "digest": "0123456789ab", "seed": "3"}
        assert not run.path.exists()

    @pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
    def test_refuses_names_that_leave_the_folder(self, name, tmp_path):
        with pytest.raises(runs.UserError, match="name in a run's path"):
            Run.locate(tmp_path, **{**NAMES, "experiment": name}, digest="0", seed=0)

    def test_found_runs_are_sorted_with_seeds_as_numbers(self, tmp_path):
        for seed in (10, 9, 2):
            Run.locate(tmp_path, **NAMES, digest="00", seed=seed).start({})
        (tmp_path / "runs/adhoc/no_run_here").mkdir()
        assert [run.names["seed"] for run in find_runs(tmp_path)] == ["2", "9", "10"]
        single = find_runs(tmp_path)[0]
        assert [run.path for run in find_runs(single.path)] == [single.path]

    def test_a_locked_but_never_started_folder_is_no_run(self, run, tmp_path):
        with run.lock():
            assert find_runs(tmp_path) == []


class TestLife:
    def test_status_from_nothing_to_finished(self, run):
        assert run.status is None
        with run.lock():
            assert run.status is None
            run.start({"optimizer": {"lr": 1e-05}}, code="abc")
            assert run.status["status"] == "running"
            assert (run.status["pid"], run.status["code"]) == (os.getpid(), "abc")
            run.finish("diverged", {"steps": 2, "loss": math.inf}, message="loss is inf at step 2")
        assert run.status["status"] == "diverged"
        assert run.status["message"] == "loss is inf at step 2"
        assert run.status["started"] <= run.status["finished"]
        assert run.summary() == {"steps": 2, "loss": math.inf}
        assert run.config() == {"optimizer": {"lr": 1e-05}}

    def test_running_without_its_lock_reads_as_killed(self, run):
        with run.lock():
            run.start({})
        assert run.status["status"] == "killed"

    @pytest.mark.parametrize("status", ["running", "done"])
    def test_finish_refuses_other_statuses(self, run, status):
        run.start({})
        with pytest.raises(ValueError, match=f"got '{status}'"):
            run.finish(status, {})

    def test_start_clears_an_earlier_attempt(self, run):
        run.start({"max_steps": 1})
        run.append([{"step": 1}])
        run.checkpoints_dir.mkdir()
        (run.checkpoints_dir / "last.pt").touch()
        run.finish("error", {"steps": 1})
        run.curves_path.touch()
        run.start({"max_steps": 2})
        assert sorted(file.name for file in run.path.iterdir()) == ["config.yaml", "status.json"]
        assert (run.config(), run.summary(), len(run.records())) == ({"max_steps": 2}, {}, 0)

    @pytest.mark.parametrize("finished", [True, False])
    def test_resume_keeps_records_up_to_the_checkpoint(self, run, finished):
        run.start({"max_steps": 9}, code="old")
        run.append([{"step": step, "lr": 0.1} for step in (1, 2, 3)])
        run.append([{"step": 2, "val/loss": math.inf}])
        run.checkpoints_dir.mkdir()
        if finished:
            run.finish("timeout", {"steps": 3})
        run.resume(2, code="new")
        run.append([{"step": 3, "lr": 0.2}])
        assert run.checkpoints_dir.exists()
        assert run.summary() == {}
        assert run.status["code"] == "new"
        run.finish("ok", {})
        records = run.records()
        assert records["step"].tolist() == [1, 2, 2, 3]
        np.testing.assert_array_equal(records["lr"], [0.1, 0.1, np.nan, 0.2])
        np.testing.assert_array_equal(records["val/loss"], [np.nan, np.nan, np.inf, np.nan])

    def test_checkpoints_appear_whole_and_go_by_name(self, run):
        run.start({})
        run.append([{"step": 1}])

        def write(name: str, content: bytes, fails: bool = False) -> None:
            with run.write_checkpoint(name) as file:
                file.write(content)
                if fails:
                    raise OSError("disk full")

        for name in ("last", "best", "step=1"):
            write(name, name.encode())
        with pytest.raises(OSError, match="disk full"):
            write("last", b"torn", fails=True)
        assert run.checkpoint_path("last").read_bytes() == b"last"
        (run.checkpoints_dir / ".last.pt.77.tmp").touch()  # of a process that was killed
        run.resume(1)
        assert {path.name for path in run.checkpoints_dir.iterdir()} == {"last.pt", "best.pt", "step=1.pt"}
        run.drop_checkpoints(but="best")
        assert [path.name for path in run.checkpoints_dir.iterdir()] == ["best.pt"]
        run.drop_checkpoints(but="last")
        assert not run.checkpoints_dir.exists()
        run.drop_checkpoints(but="none")

    def test_a_checkpoint_reaches_the_disk_after_its_records(self, run, monkeypatch):
        run.start({})
        run.append([{"step": 1}])
        synced, real = [], os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or real(file)
        )
        with run.write_checkpoint("last") as file:
            file.write(b"x")
        assert synced[0].endswith("metrics.jsonl")
        assert "last.pt" in synced[1]

    def test_resume_with_nothing_recorded(self, run):
        run.start({})
        run.resume(0)
        assert len(run.records()) == 0

    def test_last_step_at_every_stage(self, run):
        assert run.last_step() is None
        run.start({})
        assert run.last_step() is None
        run.append([{"step": 7}])
        assert run.last_step() == 7
        run.finish("oom", {})
        assert run.last_step() == 7
        run.finish("ok", {"steps": 8})
        assert run.last_step() == 8


class TestRecords:
    ROWS = (
        {"step": 1, "train/loss": 0.5, "threshold": math.inf},
        {"step": 2, "train/loss": math.nan, "threshold": -math.inf},
        {"step": 2, "val/mcc": 0.25},
    )

    @pytest.mark.parametrize("finished", [False, True])
    def test_survive_the_round_trip(self, run, finished):
        run.start({})
        run.append(list(self.ROWS[:2]))
        run.append(list(self.ROWS[2:]))
        if finished:
            run.finish("ok", {})
        table = run.records()
        assert table["step"].tolist() == [1, 2, 2]
        assert table["step"].dtype == np.int64
        np.testing.assert_array_equal(table["train/loss"], [0.5, np.nan, np.nan])
        np.testing.assert_array_equal(table["threshold"], [np.inf, -np.inf, np.nan])
        np.testing.assert_array_equal(table["val/mcc"], [np.nan, np.nan, 0.25])

    def test_lie_in_one_file_at_a_time(self, run):
        run.start({})
        run.append(list(self.ROWS))
        assert {file.name for file in run.path.iterdir()} >= {"metrics.jsonl"}
        run.finish("ok", {})
        assert [file.name for file in run.path.glob("metrics.*")] == ["metrics.parquet"]

    def test_half_written_last_line_is_ignored(self, run):
        run.start({})
        run.append(list(self.ROWS[:2]))
        lines = run.path / "metrics.jsonl"
        whole = lines.read_bytes()
        for cut in range(whole.index(b"\n") + 1, len(whole)):
            lines.write_bytes(whole[:cut])
            assert run.records()["step"].tolist() == [1]
            assert run.last_step() == 1

    def test_are_there_when_the_process_was_killed_before_removing_the_lines(self, run):
        run.start({})
        run.append(list(self.ROWS))
        lines = (run.path / "metrics.jsonl").read_bytes()
        run.finish("ok", {})
        (run.path / "metrics.jsonl").write_bytes(lines[:20])
        assert len(run.records()) == 3

    def test_scalars_of_numpy_and_torch_become_numbers(self, run):
        torch = pytest.importorskip("torch")
        run.start({})
        run.append([{"step": np.int64(1), "train/loss": torch.tensor(0.5), "lr": np.float32(0.25)}])
        assert run.records().to_dict("records") == [{"step": 1, "train/loss": 0.5, "lr": 0.25}]

    @pytest.mark.parametrize("finished", [False, True])
    def test_may_be_none_at_all(self, run, finished):
        run.start({})
        run.append([])
        if finished:
            run.finish("error", {})
        assert len(run.records()) == 0

    def test_of_many_runs_are_one_table(self, tmp_path):
        several = []
        for seed, records in enumerate((list(self.ROWS), [], [{"step": 7, "val/mcc": 1}])):
            several.append(Run.locate(tmp_path, **NAMES, digest="0123456789ab", seed=seed))
            several[-1].start({})
            several[-1].append(records)
            several[-1].finish("ok", {})
        table = load_records(several, ["step", "val/mcc", "lr"])
        assert list(table) == ["step", "val/mcc", "lr", "run"]
        assert table["run"].tolist() == [0, 0, 0, 2]
        assert table["step"].tolist() == [1, 2, 2, 7]
        np.testing.assert_array_equal(table["val/mcc"], [np.nan, np.nan, 0.25, 1.0])
        assert table["lr"].isna().all()
        assert len(load_records([], ["step"])) == 0


class TestWriteWhole:
    def test_failure_leaves_the_old_file_and_no_other(self, tmp_path):
        path = tmp_path / "summary.json"
        path.write_text("old")

        def fail():
            with write_whole(path) as file:
                file.write(b"ne")
                assert path.read_text() == "old"
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            fail()
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_nothing_is_visible_before_it_is_complete(self, tmp_path):
        path = tmp_path / "summary.json"
        with write_whole(path) as file:
            file.write(b"new")
            assert not path.exists()
        assert path.read_bytes() == b"new"

    def test_bytes_reach_the_disk_before_the_name(self, tmp_path, monkeypatch):
        calls = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)

            def recorded(*args, name=name, real=real):
                calls.append(name)
                return real(*args)

            monkeypatch.setattr(os, name, recorded)
        with write_whole(tmp_path / "file") as file:
            file.write(b"x")
        assert calls == ["fsync", "replace", "fsync"]

    def test_a_failing_summary_leaves_the_run_unfinished(self, run):
        with run.lock():
            run.start({})
            run.append([{"step": 1}])
            with pytest.raises(AttributeError):
                run.finish("ok", {"bad": object()})
            assert run.status["status"] == "running"
            assert len(run.records()) == 1


HOLDER = """
import os, sys, time
from experiments.runs import Run
run = Run(sys.argv[1])
with run.lock():
    run.start({"max_steps": 3})
    run.append([{"step": 1}])
    if sys.argv[2] == "fork" and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    if sys.argv[2] == "alone":
        print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run):
    """Start processes that hold the run's lock; yields their first line of output."""
    started = []

    def start(mode: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-c", HOLDER, str(run.path), mode]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class TestLock:
    def test_two_in_one_process(self, run):
        with run.lock(), pytest.raises(RunLocked), Run(run.path).lock():
            pass
        with run.lock():
            pass

    def test_a_killed_process_lets_go_and_its_run_reads_as_killed(self, run, holder):
        process, line = holder("alone")
        assert line == "ready"
        assert run.status["status"] == "running"
        with pytest.raises(RunLocked, match=f"process {process.pid} on"), run.lock():
            pass
        assert run.status["status"] == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.status["status"] == "killed"
        assert run.records()["step"].tolist() == [1]
        with run.lock():
            run.resume(1)
            assert run.status["status"] == "running"

    def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(self, run, holder):
        process, child = holder("fork")
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            os.kill(int(child), 0)  # the child lives
            assert run.status["status"] == "killed"
        finally:
            os.kill(int(child), signal.SIGKILL)

    def test_reading_the_status_never_makes_a_starter_fail(self, run):
        run.start({})
        code = "import sys; from experiments.runs import Run; run = Run(sys.argv[1])\nwhile run.status: pass"
        reader = subprocess.Popen([sys.executable, "-c", code, str(run.path)])
        try:
            deadline, taken = time.monotonic() + 1, 0
            while time.monotonic() < deadline:
                with run.lock():  # raises RunLocked if the reader's moment counts as a run
                    taken += 1
            assert taken > 100
        finally:
            reader.kill()
            reader.wait()
