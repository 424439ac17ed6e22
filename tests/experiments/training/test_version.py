"""What a run says of the code that made it."""

import shutil
import subprocess

import pytest

from experiments.training.version import version_of

FILES = (
    "experiments/training/version.py",
    "experiments/analysis/stats.py",
    "torch_clip/norms.py",
    "conf/run.yaml",
    "conf/figure/one.yaml",
    "README.md",
    ".gitignore",
)


def git(root, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(
        ["git", *who, *command], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""
    root = tmp_path / "checkout"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("__pycache__/\n" if name == ".gitignore" else "one\n")
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    return root


def test_a_commit_as_it_is(checkout):
    assert version_of(checkout) == git(checkout, "rev-parse", "--short=12", "HEAD")


def test_two_edits_are_two_versions_and_one_edit_is_one(checkout, tmp_path):
    commit, file = version_of(checkout), checkout / "torch_clip/norms.py"
    file.write_text("two\n")
    first = version_of(checkout)
    base, _, edit = first.partition("+edited.")
    assert base == commit
    assert len(edit) == 8
    file.write_text("three\n")
    assert version_of(checkout) not in (first, commit)
    file.write_text("two\n")
    assert version_of(checkout) == first
    git(checkout, "add", ".")
    assert version_of(checkout) == first  # staged or not
    shutil.copytree(checkout, tmp_path / "elsewhere")
    assert version_of(tmp_path / "elsewhere") == first
    file.write_text("one\n")
    git(checkout, "add", ".")
    assert version_of(checkout) == commit


def test_new_and_deleted_files_count(checkout):
    seen = {version_of(checkout)}
    for change in (
        lambda: (checkout / "conf/mine.yaml").write_text("new\n"),
        lambda: (checkout / "conf/mine.yaml").write_text("newer\n"),
        lambda: (checkout / "conf/mine.yaml").rename(checkout / "conf/other name é.yaml"),
        lambda: (checkout / "torch_clip/norms.py").unlink(),
    ):
        change()
        seen.add(version_of(checkout))
    assert len(seen) == 5


@pytest.mark.parametrize(
    "name", ["README.md", "experiments/analysis/stats.py", "conf/figure/new.yaml", "conf/__pycache__/a.pyc"]
)
def test_what_makes_no_run_does_not_count(checkout, name):
    commit = version_of(checkout)
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("edited\n")
    assert version_of(checkout) == commit


def test_a_repository_around_the_checkout(checkout, tmp_path):
    """As where it was vendored: names are told from the top of that."""
    around = tmp_path / "around"
    shutil.copytree(checkout, around / "vendored", ignore=shutil.ignore_patterns(".git"))
    git(tmp_path, "init", "-q", str(around))
    git(around, "add", ".")
    git(around, "commit", "-q", "-m", "one")
    versions = {version_of(around / "vendored")}
    for text in ("two", "three"):
        (around / "vendored/conf/run.yaml").write_text(text)
        versions.add(version_of(around / "vendored"))
    assert len(versions) == 3


def test_no_version_outside_a_checkout(checkout, monkeypatch, tmp_path):
    shutil.rmtree(checkout / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert version_of(checkout) is None
    monkeypatch.setenv("PATH", "")
    assert version_of(checkout) is None
