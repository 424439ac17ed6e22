"""``clipbench report``: one page that needs nothing but itself, and says what went wrong too."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread

from experiments import cli
from experiments.analysis.report import MOST_LINES

VOID = {"meta", "img", "br", "hr", "link", "input"}
BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")


class Page(HTMLParser):
    """What is on a page, and whether its tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(tmp_path, capsys):
    """The page of what is typed after ``clipbench report``."""

    def write(*argv: str) -> Page:
        assert cli._dispatch(["report", *argv, "--results-dir", str(tmp_path)]) == 0, capsys.readouterr().err
        path = Path(capsys.readouterr().out.strip())
        return Page(path.read_text(encoding="utf8"))

    return write


@pytest.fixture(scope="module")
def written(two_tasks, tmp_path_factory) -> Path:
    """The page of an experiment: norm is better on two tasks, of auto_clip two runs diverged."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    argv = ["report", str(two_tasks[0].path.parents[4]), "--out", str(path)]
    assert cli._dispatch(argv) == 0
    return path


@pytest.fixture(scope="module")
def report(written) -> Page:
    return Page(written.read_text(encoding="utf8"))


def test_the_page_needs_nothing_but_itself(report):
    assert {tag for tag, _ in report.tags}.isdisjoint({"script", "link", "iframe", "object", "video"})
    for _, attrs in report.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data"):
                assert value.startswith(("#", "data:image/png;base64,"))
            assert "url(" not in (value or "")
    assert report.of("meta")[0] == {"charset": "utf-8"}
    assert any("width=device-width" in attrs.get("content", "") for attrs in report.of("meta"))


def test_pictures_are_pictures_and_links_lead_somewhere(report):
    pictures = report.of("img")
    assert len(pictures) == 4  # of each task the comparison and the cost
    for picture in pictures:
        assert picture["alt"]
        content = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert imread(io.BytesIO(content)).std() > 0.01
    assert "clipping-cola: none of these runs has recorded grad_norm, threshold" in report.text
    named = {attrs["id"] for _, attrs in report.tags if "id" in attrs}
    assert {attrs["href"].removeprefix("#") for attrs in report.of("a")} <= named


def test_verdicts_settings_and_how_to_reproduce(report):
    assert "better" in report.cells
    assert report.cells.index("verdict") < report.cells.index("final [range]")
    for cell in (
        "clipping",
        "auto_clip (5 runs), no_clip (5 runs), norm (5 runs)",
        "2.15.0",
        "c0ffee",
    ):
        assert cell in report.cells
    assert "optimizer.lr" in report.cells  # the same in all
    assert "cola (mini preset), quadratic (mini preset)" in report.text


def test_what_ended_badly_is_listed_with_its_words(make_run, make_runs, page):
    make_runs([0.5, math.nan])
    failed = make_run(0.5, clipping="spam", status="oom")
    failed.finish("oom", failed.summary(), 'CUDA out of memory <script>alert("&")</script>')
    killed = make_run(0.5, clipping="uclip")
    (killed.path / "summary.json").unlink()
    status = killed.path / "status.json"
    status.write_text(status.read_text().replace('"status": "ok"', '"status": "running"'))
    report = page("made")
    assert "4 runs: 1 ok, 1 diverged, 1 oom, 1 killed." in report.text
    for status in ("diverged", "oom", "killed"):
        assert report.cells.count(status) >= 2  # among those that ended badly, and among all
    assert 'CUDA out of memory <script>alert("&")</script>' in report.cells  # as text
    assert any(cell.startswith("made/cola-mini/sgd-spam/") for cell in report.cells)


def test_the_sweeps_that_made_it_are_the_commands(make_run, page, tmp_path):
    make_run(0.5)
    sweep = tmp_path / "sweeps/made/0123456789ab"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text('{"command": "clipbench run -m clipping=norm", "created": "2026"}')
    assert "clipbench run -m clipping=norm" in page("made").text


def test_of_a_tuned_experiment_each_method_is_at_its_best(make_run, page, tmp_path):
    for clipping, better in (("no_clip", 0.5), ("norm", 0.6)):
        for seed, lr in itertools.product((0, 7, 8), (0.1, 0.2)):
            if (seed, lr) != (7, 0.1):
                final = better + lr + 0.01 * seed
                make_run(final, seed=seed, clipping=clipping, settings={"optimizer.lr": lr})
    sweep = tmp_path / "sweeps/made/0123456789ab"
    sweep.mkdir(parents=True)
    facts = {"command": "clipbench run", "created": "2026", "search": {"select_seeds": [0], "metric": None}}
    (sweep / "sweep.json").write_text(json.dumps(facts))
    cells = page("made").cells
    at = cells.index("norm")  # of the first table, that of verdicts
    assert cells[at + 1].startswith(("better", "no detectable difference"))
    assert cells[at + 2].startswith("0.875 [")  # the mean of seeds 7 and 8 with lr=0.2


def test_a_folder_and_several_experiments(make_runs, page, tmp_path):
    make_runs([0.5, 0.6], experiment="one")
    make_runs([0.5, 0.6], experiment="two", clipping="norm")
    assert "one, two" in page("one", "two").text
    assert "2 runs: 2 ok." in page(str(tmp_path / "runs/two"), "--out", str(tmp_path / "page.html")).text


def test_runs_that_cannot_be_compared_are_drawn_and_the_page_says_why(make_runs, page):
    make_runs([0.5, 0.6])
    make_runs([0.5, 0.6], clipping="norm", code="0ther")
    report = page("made")
    assert "No table: these runs differ in their code version" in report.text
    assert report.of("img")


def test_of_many_settings_the_best_are_drawn(make_runs, page):
    for lr in range(1, MOST_LINES + 2):
        for clipping in ("norm", "no_clip"):
            make_runs([0.02 * lr] * 2, clipping=clipping, settings={"optimizer.lr": lr / 100})
    report = page("made")
    assert f"of {2 * MOST_LINES + 2} settings those of the 2 best clippings" in report.text
    assert "4 runs" in report.text


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["mede"], "'mede' is no experiment in {runs} and no folder; there is made. Did you mean 'made'?"),
        (["empty"], "there are no runs in {runs}/empty"),
        (["made", "--out", "/proc/page.html"], "--out: cannot write"),
    ],
)
def test_bad_input(make_run, tmp_path, capsys, argv, told):
    make_run(0.5)
    (tmp_path / "runs" / "empty").mkdir()
    if argv[0] == "mede":
        (tmp_path / "runs" / "empty").rmdir()
    before = sorted(tmp_path.rglob("*"))
    assert cli._dispatch(["report", *argv, "--results-dir", str(tmp_path)]) == 2
    assert told.format(runs=tmp_path / "runs") in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_browser_opens_it(written, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH")
    # What the page holds is read back from the browser; the title tells whether all pictures were decoded.
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { document.title = [...document.images].every("
        "image => image.complete && image.naturalWidth > 100) + ' ' + document.images.length + ' ' +"
        "(document.documentElement.scrollWidth <= innerWidth) })</script>"
    )
    probe.write_text(written.read_text().replace("</head>", f"{script}</head>"))
    for width in (390, 1280):
        argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        argv += [
            f"--user-data-dir={tmp_path / 'browser'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            str(probe),
        ]
        told = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
        # All pictures there, and nothing wider than the screen but what scrolls by itself.
        assert re.search(r"<title>(.*?)</title>", told)[1] == "true 4 true"
