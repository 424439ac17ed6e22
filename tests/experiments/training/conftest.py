"""A command line in an empty folder."""

from __future__ import annotations

import pytest

from experiments import cli


@pytest.fixture
def clipbench(tmp_path, monkeypatch):
    """``clipbench`` with what is typed after it, in this process; returns the exit code. Draws nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.analysis.draw.draw_curves", lambda run: None)

    def run(*argv: str) -> int:
        try:
            return cli._dispatch(list(argv))
        except SystemExit as stop:
            return stop.code

    return run
