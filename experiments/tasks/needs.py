"""What a task reads and does not bring: whether it is there, where it was looked for, how to get it."""

from __future__ import annotations

import os
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.errors import UserError

CONNECT_SECONDS = 5.0
NOT_FETCHED = "not fetched yet"


class Need(NamedTuple):
    """Data or weights that a task reads and does not bring, as they were when this was made."""

    what: str
    """Its name."""
    place: Path | None
    """Where it lies, or is kept once it is fetched."""
    problem: str | None
    """Why it cannot be used, as far as a look at the files tells; None if it can."""
    source: str = ""
    """Address that it can be fetched from."""
    fetch: Callable[[], object] | None = None
    """Fetches it, by the library that knows it; None where nobody may, or where a folder was given."""
    give: str = ""
    """Setting that names another place, or does without it."""

    def check(self) -> None:
        """Raise ``UserError`` unless it is there, or the place to fetch it from answers."""
        if self.problem is None:
            return
        if self.fetch is None:
            raise UserError(self.problem)
        if not reachable(self.source):
            why = "HF_HUB_OFFLINE is set" if _is_shunned(self.source) else "no network"
            raise self._failed(f"{why}, and no earlier download")

    def get(self) -> None:
        """Fetch it, unless it is there; raise ``UserError`` where that cannot be done."""
        if self.problem is None:
            return
        self.check()
        try:
            self.fetch()
        except (UserError, ModuleNotFoundError):
            raise
        except Exception as error:  # network, checksum, archive, disk: the libraries raise as it comes
            raise self._failed(reason(error)) from error

    def _failed(self, why: str) -> UserError:
        return UserError(
            f"cannot get {self.what}: {why}. Looked at {self.source} and in {self.place}. Ways on: "
            f"{self.give}, a network, or preset=mini, which needs none"
        )


def in_folder(what: str, folder: Path, look: Callable[[Path], object]) -> Need:
    """What is to lie in a folder.

    Args:
        what: its name.
        folder: of it.
        look: at the files there; raises ``UserError`` if one is missing.
    """
    try:
        look(folder)
    except UserError as error:
        return Need(what, folder, str(error))
    return Need(what, folder, None)


def published_files(data_dir: Path, names: Sequence[str | Path], expected: str) -> list[Path]:
    """Files of a data set in its original format; an error says which folder to give, or what is missing.

    Args:
        data_dir: that was given.
        names: of files or folders, from there; a folder is recognised by the first.
        expected: what ``data_dir`` must hold, for the message.
    """
    missing = [name for name in names if not (data_dir / name).exists()]
    if missing:
        raise UserError(f"data_dir must hold {expected}; {_what_to_give(data_dir, Path(names[0]), missing)}")
    return [data_dir / name for name in names]


def _what_to_give(data_dir: Path, mark: Path, missing: Sequence[str | Path]) -> str:
    here, depth = data_dir.absolute(), max(1, len(mark.parts) - 1)
    if not data_dir.is_dir():
        return f"there is no folder {here}"
    if not (here / mark).exists():
        for above in here.parents[:depth]:
            if (above / mark).exists():
                return f"{here} is a part of it: give data_dir={above}"
        for below in (found for levels in ("*", "*/*") for found in sorted(here.glob(f"{levels}/{mark}"))):
            return f"not in {here} but further in: give data_dir={below.parents[len(mark.parts) - 1]}"
    return f"missing in {here}: {', '.join(map(str, missing))}"


def fetch_whole(fetch: Callable[[Path], object], root: Path, part: str) -> None:
    """Fetch a folder so that whatever has its name is whole, however often that breaks off.

    Args:
        fetch: fills the empty folder that it is given.
        root: of the download; made if it is not there.
        part: of what ``fetch`` has put there: takes the place of ``root / part``.
    """
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / part, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root) as aside:
        fetch(Path(aside))
        try:
            os.replace(Path(aside, part), root / part)
        except OSError:
            if not (root / part).exists():  # else another process was faster
                raise


def reachable(url: str) -> bool:
    """Whether a server answers one short request: the libraries' own try for half a minute and more.

    The hub's is not asked in its offline mode. Proxies are taken from the environment as usual.
    """
    if _is_shunned(url):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an answer, if no good one
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # not every library asks for a certificate
    except Exception:  # whatever goes wrong on the way means the same
        return False
    return True


def _is_shunned(url: str) -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) and url.startswith(constants.ENDPOINT)


def reason(error: BaseException) -> str:
    """The first sentence of an error, for messages: the libraries' own run over pages."""
    sentence = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    # A KeyError says no more than its key.
    return f"{type(error).__name__} {sentence}" if isinstance(error, KeyError) else sentence
