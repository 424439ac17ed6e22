"""Locks on files. That a killed process and its forked children let go is tested with the runs."""

from __future__ import annotations

import pytest

from experiments import locks


def test_one_holds_and_all_see_it(tmp_path):
    path = tmp_path / "lock"
    assert not locks.is_held(path)
    assert not path.exists()
    with locks.hold(path):
        assert locks.is_held(path)
        with pytest.raises(BlockingIOError), locks.hold(path):
            raise AssertionError
        assert locks.is_held(path)
    assert not locks.is_held(path)
    with locks.hold(path):
        pass


def test_it_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), locks.hold(tmp_path / "lock"):
        raise KeyError
    assert not locks.is_held(tmp_path / "lock")
