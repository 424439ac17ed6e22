"""What a task needs: whether it is there, what the message says if not, and downloads that break off."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.tasks import needs
from experiments.tasks.needs import Need, fetch_whole, in_folder, published_files, reachable

FILES = ("raw/a.txt", "raw/b.txt")


def write(root: Path, *names: str) -> Path:
    for name in names or FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


# Files as published


def test_files_that_are_there_are_found(tmp_path):
    root = write(tmp_path / "set")
    assert published_files(root, FILES, "both") == [root / name for name in FILES]
    assert in_folder("Set", root, lambda folder: published_files(folder, FILES, "both")) == Need(
        "Set", root, None
    )


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("sets/one/raw", "sets/one/raw is a part of it: give data_dir={}/sets/one"),
        ("sets", "not in {}/sets but further in: give data_dir={}/sets/one"),
        (".", "further in: give data_dir={}/sets/one"),
        ("nowhere", "there is no folder {}/nowhere"),
        ("empty", "missing in {}/empty: raw/a.txt, raw/b.txt"),
        ("sets/of/half", "missing in {}/sets/of/half: raw/b.txt"),
    ],
)
def test_a_wrong_folder_is_told_the_right_one(tmp_path, monkeypatch, given, found):
    write(tmp_path / "sets" / "one")
    write(tmp_path / "sets" / "of" / "half", "raw/a.txt")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)  # where it also works for a relative folder
    for folder in (Path(given), tmp_path / given):
        with pytest.raises(UserError) as error:
            published_files(folder, FILES, "both files")
        assert str(error.value).startswith("data_dir must hold both files; ")
        assert str(error.value).endswith(found.replace("{}", str(tmp_path)))


# Fetching


def need(problem: str | None = "not fetched yet", fetch=lambda: None) -> Need:
    return Need("Set", Path("/kept"), problem, "https://set.example", fetch, "data_dir=<folder>")


def test_what_is_there_is_not_fetched_and_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(needs, "reachable", lambda url: pytest.fail("asked"))
    need(None, lambda: pytest.fail("fetched")).get()
    need(None).check()


def test_what_nobody_may_fetch_says_its_own_message():
    for call in (Need.check, Need.get):
        with pytest.raises(UserError, match=r"^ask the owner$"):
            call(Need("Set", None, "ask the owner"))


def test_no_network_is_said_with_the_ways_on(monkeypatch):
    asked = []
    monkeypatch.setattr(needs, "reachable", lambda url: asked.append(url))
    for call in (Need.check, Need.get):
        with pytest.raises(UserError) as error:
            call(need(fetch=lambda: pytest.fail("fetched")))
        assert str(error.value) == (
            "cannot get Set: no network, and no earlier download. Looked at https://set.example and in "
            "/kept. Ways on: data_dir=<folder>, a network, or preset=mini, which needs none"
        )
    assert asked == ["https://set.example"] * 2


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            RuntimeError("File not found or corrupted. More."),
            UserError,
            "cannot get Set: File not found or co",
        ),
        (OSError(28, "No space left on device"), UserError, "No space left on device. Looked at https://"),
        (UserError("its own message"), UserError, "^its own message$"),
        (ModuleNotFoundError("No module named 'x'"), ModuleNotFoundError, "No module named 'x'"),
    ],
)
def test_a_failed_download_is_one_message(monkeypatch, raised, kind, message):
    def fail():
        raise raised

    monkeypatch.setattr(needs, "reachable", lambda url: True)
    with pytest.raises(kind, match=message):
        need(fetch=fail).get()


def test_a_download_that_breaks_off_leaves_nothing_that_looks_whole(tmp_path):
    def broken(folder):
        write(folder, "raw/a.txt")
        raise OSError("cable cut")

    for _ in range(2):
        with pytest.raises(OSError, match="cable cut"):
            fetch_whole(broken, tmp_path / "kept", "raw")
        assert list((tmp_path / "kept").iterdir()) == []
    write(tmp_path / "kept", "raw/left over by something else")
    fetch_whole(write, tmp_path / "kept", "raw")
    assert {path.name for path in (tmp_path / "kept" / "raw").iterdir()} == {"a.txt", "b.txt"}


def test_of_two_that_fetch_the_same_the_second_uses_what_the_first_has_got(tmp_path):
    def overtaken(folder):
        fetch_whole(write, tmp_path, "raw")
        write(folder, "raw/a.txt")

    fetch_whole(overtaken, tmp_path, "raw")
    assert {path.name for path in (tmp_path / "raw").iterdir()} == {"a.txt", "b.txt"}
    with pytest.raises(FileNotFoundError):
        fetch_whole(lambda folder: None, tmp_path / "other", "raw")


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (urllib.error.HTTPError("u", 405, "no HEAD", {}, None), True),
        (urllib.error.URLError(ssl.SSLCertVerificationError("expired")), True),
        (urllib.error.URLError("no route"), False),
        (TimeoutError("slow"), False),
        (http.client.BadStatusLine("what"), False),
    ],
)
def test_any_answer_of_a_server_is_an_answer(monkeypatch, outcome, found):
    def urlopen(request, timeout):
        assert (request.full_url, request.get_method()) == ("https://set.example", "HEAD")
        assert timeout <= 5
        raise outcome

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert reachable("https://set.example") is found


def test_the_hub_is_not_asked_in_its_offline_mode(monkeypatch):
    from huggingface_hub import constants

    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    on_the_hub = need()._replace(source=f"{constants.ENDPOINT}/model")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and no earlier download"):
        on_the_hub.get()
    with pytest.raises(UserError, match="no network"):
        need().get()
    assert asked == ["https://set.example"]
