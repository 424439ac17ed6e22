"""What a summary says of where a run's numbers come from."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType

import pytest

from experiments.training.summary import PACKAGES, versions


@pytest.mark.parametrize(
    "module", ["torchvision", "torch_geometric", "segmentation_models_pytorch", "transformers", "datasets"]
)
def test_versions_are_of_what_was_imported(module, monkeypatch):
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert PACKAGES[module] not in versions()
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert versions()[PACKAGES[module]] == version(PACKAGES[module])


def test_versions_of_what_every_run_uses_are_there(monkeypatch):
    monkeypatch.setitem(PACKAGES, "experiments", "not-installed")
    assert {"python", "torch", "numpy", "torch-clip"} <= set(versions())
    assert versions()["not-installed"] == "unknown"
