"""Which code this is."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path


@functools.cache
def code_version() -> str | None:
    """The git commit this package runs from, marked if edited since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=False)
    try:
        tracked = git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        if tracked.returncode:
            return None
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        dirty = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except FileNotFoundError:
        return None
    return commit + ("+edited" if dirty else "")
