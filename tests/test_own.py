"""The README's section on one's own clipping, optimizer and task, typed word for word."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.partition("### Benchmark your own")[2].partition("\n## ")[0]
PLACES = {
    "class MyClip": "my_clip.py",
    "my_clip.MyClip\npercentile": "conf/clipping/mine.yaml",
    "torch.optim.RMSprop\n_partial_": "conf/optimizer/rmsprop.yaml",
    "class Spirals": "my_task.py",
    "my_task.Spirals": "conf/task/spirals.yaml",
    "max_steps": "conf/preset/spirals/mini.yaml",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the section's files."""
    for place in PLACES.values():
        assert Path(place).name in SECTION
    for text in re.findall(r"```(?:python|yaml)\n(.*?)```", SECTION, re.DOTALL):
        (place,) = [place for mark, place in PLACES.items() if mark in text]
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    return tmp_path


def clipbench(folder: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *argv],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.mark.slow
def test_all_commands_of_the_section_work(folder):
    told = [clipbench(folder, *argv) for argv in commands()]
    assert "failed" not in told[0]
    assert "9 jobs" in told[1]
    assert "mine" in told[2]
    assert float(re.search(r"accuracy ([\d.]+)", told[3].splitlines()[-2])[1]) > 0.9


def test_own_task_clipping_and_optimizer_in_one_run(folder):
    short = ["max_steps=20", "eval_every=20", "quiet=true"]
    own = ["--config-dir", "conf", "task=spirals", "clipping=mine", "optimizer=rmsprop"]
    assert "spirals-mini/rmsprop-mine" in clipbench(folder, "run", *own, *short)
