"""The sweep folder: identity, whole lines, who works on what."""

from __future__ import annotations

import json
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments import sweeps
from experiments.runs import Run
from experiments.sweeps import Job, Sweep, digest, find_drafts, find_sweeps, labels

CONF = "0123456789ab"


def a_job(number: int) -> Job:
    config = {"seed": number, "clipping": {"threshold": math.inf, "window": None}, "lr": 0.1}
    return Job(["task=quadratic", f"seed={number}"], {"task": "quadratic"}, config, f"runs/x/{number}")


@pytest.fixture
def sweep(tmp_path):
    sweep = Sweep.locate(tmp_path / "results", "adhoc", "0123456789ab")
    sweep.create({"overrides": [], "inputs": []}, map(a_job, range(3)))
    return sweep


class TestDigest:
    @pytest.mark.parametrize(
        "added",
        [
            *("results_dir=b", "quiet=true", "force=true", "hydra/launcher=joblib", "hydra.mode=MULTIRUN"),
            *("hydra.launcher.n_jobs=2", "+hydra.launcher.x=2", "hydra.sweeper.max_batch_size=3"),
        ],
    )
    def test_is_blind_to_how_a_sweep_is_launched(self, added):
        assert digest(["seed=0,1", added], CONF) == digest(["seed=0,1"], CONF)

    @pytest.mark.parametrize(
        "added", ["seed=0,1,2", "keep=all", "+optimizer.x=1", "data_dir=d", "device=cpu"]
    )
    def test_sees_everything_else(self, added):
        assert digest(["seed=0,1", added], CONF) != digest(["seed=0,1"], CONF)

    def test_is_blind_to_order_and_sees_the_configuration(self):
        assert digest(["a=1", "b=2"], CONF) == digest(["b=2", "a=1"], CONF)
        assert digest(["a=1"], CONF) != digest(["a=1"], "ba9876543210")


class TestFolder:
    def test_gives_back_what_it_was_given(self, sweep):
        assert sweep.exists
        assert sweep.experiment == "adhoc"
        assert sweep.jobs() == [a_job(number)._replace(index=number) for number in range(3)]
        assert sweep.job(2) == sweep.jobs()[2]
        assert sweep.facts()["overrides"] == []
        assert sweep.run(sweep.job(1)).path == sweep.results_dir / "runs/x/1"
        assert {path.name for path in sweep.path.iterdir()} == {"sweep.json", "jobs.jsonl"}

    def test_is_found_from_within(self, sweep, monkeypatch):
        monkeypatch.chdir(sweep.path)
        assert Sweep(".").results_dir.resolve() == sweep.results_dir
        assert Sweep(".").experiment == "adhoc"

    def test_is_there_whole_or_not_at_all(self, tmp_path):
        def jobs():
            yield a_job(0)
            raise KeyboardInterrupt

        sweep = Sweep.locate(tmp_path, "adhoc", "0123456789ab")
        with pytest.raises(KeyboardInterrupt):
            sweep.create({}, jobs())
        assert not sweep.exists
        assert list((tmp_path / "sweeps/adhoc").iterdir()) == []

    def test_of_two_that_create_it_the_first_is_right(self, sweep):
        Sweep(sweep.path).create({"overrides": ["other"]}, [a_job(9)])
        assert sweep.facts()["overrides"] == []
        assert len(sweep.jobs()) == 3
        assert list(sweep.path.parent.iterdir()) == [sweep.path]

    def test_a_line_that_was_cut_off_is_no_job_and_spoils_none(self, sweep):
        lines = sweep.path / "jobs.jsonl"
        with lines.open("ab") as file:
            file.write(b'{"overrides": ["cut')
        assert len(sweep.jobs()) == 3
        (added,) = sweep.append([a_job(3)])
        assert added.index == 3
        assert sweep.jobs()[3] == added

    def test_lines_added_at_once_get_places_of_their_own(self, sweep):
        with ThreadPoolExecutor(8) as pool:
            added = list(pool.map(lambda number: sweep.append([a_job(number)])[0], range(3, 43)))
        assert sorted(job.index for job in added) == list(range(3, 43))
        assert [job.index for job in sweep.jobs()] == list(range(43))
        assert all(sweep.job(job.index) == job for job in added)

    def test_sweeps_are_found_the_oldest_first(self, sweep, tmp_path):
        for experiment in ("b", "a"):
            Sweep.locate(tmp_path / "results", experiment, "9").create({}, [])
        draft = tmp_path / "results/sweeps/a/.9.123.tmp"
        draft.mkdir()
        (draft / "sweep.json").write_text("{}")
        assert [found.experiment for found in find_sweeps(tmp_path / "results")] == ["adhoc", "b", "a"]
        assert [found.path for found in find_sweeps(tmp_path / "results", "adhoc")] == [sweep.path]
        assert find_drafts(tmp_path / "results") == [draft]
        assert find_sweeps(tmp_path / "nowhere") == []

    def test_changed_input_is_named(self, tmp_path):
        files = [tmp_path / name for name in ("a.tsv", "b.tsv")]
        for file in files:
            file.write_text("same")
        sweep = Sweep.locate(tmp_path, "adhoc", "0")
        sweep.create({"inputs": sweeps.looks_of(files)}, [])
        assert sweep.changed_input() is None
        stat = files[1].stat()
        files[1].write_text("swap")
        assert sweep.changed_input() == str(files[1])
        os.utime(files[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert sweep.changed_input() is None
        files[1].unlink()
        assert sweep.changed_input() == str(files[1])

    def test_of_very_many_inputs_some_are_kept(self, tmp_path):
        files = [tmp_path / f"{number}.png" for number in range(1000)]
        assert 200 < len(sweeps.looks_of(files)) <= sweeps.SAMPLED_FILES


def test_labels_say_what_differs():
    jobs = [["task=cola", "seed=0", "clipping=norm"], ["task=cola", "seed=1", "clipping=norm"]]
    assert labels(jobs) == ["seed=0", "seed=1"]
    assert labels(jobs[:1]) == ["task=cola seed=0 clipping=norm"]
    assert labels([]) == []


def test_counts_name_what_there_is():
    assert sweeps.count(["ok", "missing", "error", "ok"]) == "2 ok, 1 error, 1 missing"


def died(do) -> None:
    """Let a forked process do something and be killed while it does."""
    pid = os.fork()
    if not pid:
        try:
            with do:
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


class TestWhoWorks:
    def test_a_job_is_one_process_s(self, sweep):
        with sweep.claim(1) as mine:
            assert mine
            assert sweep.is_claimed(1)
            assert not sweep.is_claimed(0)
            with Sweep(sweep.path).claim(1) as also, sweep.claim(0) as other:
                assert not also
                assert other
            assert sweep.is_claimed(1)
            assert sweep.abandoned(range(3)) == []
        assert not sweep.is_claimed(1)
        assert sweep.abandoned(range(3)) == []

    def test_who_died_at_a_job_is_known_once(self, sweep):
        died(sweep.claim(2))
        assert not sweep.is_claimed(2)
        assert sweep.abandoned(range(3)) == [2]
        assert sweep.abandoned(range(3)) == []

    def test_a_launch_lives_as_long_as_its_process(self, sweep, capfd):
        with sweep.launching() as launch:
            assert sweep.is_live(launch)
        assert not sweep.is_live(launch)
        died(sweep.launching())
        (left,) = (sweep.path / ".live").iterdir()
        assert not sweep.is_live(left.name)

    def test_jobs_spread_over_the_devices(self, sweep):
        with sweep.device(2) as first, sweep.device(2) as second:
            assert (first, second) == (0, 1)
            with sweep.device(2) as third:
                assert third == 0
                with sweep.device(2) as fourth:
                    assert fourth == 1
            with sweep.device(2) as again:
                assert again == 0
        with sweep.device(2) as first:
            died(sweep.device(2))
            with sweep.device(2) as second:
                assert (first, second) == (0, 1)


def test_status_is_that_of_the_run(sweep):
    job = sweep.job(0)
    assert sweep.status(job) == {"status": "missing"}
    run = Run(sweep.results_dir / job.run)
    with run.lock():
        run.start(job.config)
        assert sweep.status(job)["status"] == "running"
    assert sweep.status(job)["status"] == "killed"
    assert json.loads((run.path / "status.json").read_text())["status"] == "running"
