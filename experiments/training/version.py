"""Which code this is."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

PARTS = ("torch_clip", "experiments", "conf", ":!experiments/analysis", ":!conf/figure")
"""What runs are made by; what only reads them changes none of their numbers."""


@functools.cache
def code_version() -> str | None:
    """The git commit this package runs from, and what was edited since; None outside a checkout."""
    return version_of(Path(__file__).resolve().parents[2])


def version_of(root: Path) -> str | None:
    """The commit of a checkout, with ``+edited.`` and a digest of the files that are not as they are in it.

    The same files give the same version, whether or not they are staged.
    """
    git = functools.partial(subprocess.run, cwd=root, capture_output=True, check=False)
    try:
        tracked = git(["git", "ls-files", "--error-unmatch", "experiments/training/version.py"])
        if tracked.returncode:
            return None
        told = git(["git", "rev-parse", "--show-toplevel", "--short=12", "HEAD"]).stdout
        status = ["git", "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *PARTS]
        edited = sorted({line[3:] for line in git(status).stdout.split(b"\0") if line})
    except FileNotFoundError:
        return None
    top, commit = os.fsdecode(told).splitlines()
    return commit + (f"+edited.{_digest(top, map(os.fsdecode, edited))}" if edited else "")


def _digest(top: str, names: Iterable[str]) -> str:
    """Of names and contents of files, 8 hex digits."""
    total = hashlib.sha256()
    for name in names:
        path = Path(top, name)
        content = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b""  # or it is deleted
        total.update(os.fsencode(name) + b"\0" + content)
    return total.hexdigest()[:8]
