"""``clipbench prepare``: what it says, fetches, reads and refuses, and its exit codes."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image

from experiments.commands.prepare import PREPARE_HELP
from experiments.tasks import needs, reddit, voc
from experiments.tasks.cola import FILES
from experiments.tasks.graphs import torch_geometric
from experiments.training.presets import conf_dir

TASKS = sorted(path.stem for path in (conf_dir() / "task").glob("*.yaml"))
LIGHT = "task.model={encoder_name:tu-mobilenetv3_small_050,encoder_depth:3,decoder_channels:[16,16,8]}"
VOC = ["task=voc", LIGHT, "task.num_workers=0", "task.image_size=64", "task.batch_size=2"]
REDDIT = ["task=reddit", "task.model.hidden=8", "task.batch_size=2"]


def write_cola(root: Path) -> None:
    (root / "raw").mkdir(parents=True)
    for name in FILES:
        (root / name).write_text("a\t1\t\tA good sentence.\na\t0\t*\tSentence good a.\n" * 3)


def write_imagenet(root: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / f"{wnid}.JPEG")


def write_voc(root: Path) -> None:
    devkit = root / voc.DEVKIT
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    for split, names in {"train": ("1", "2", "3", "4"), "val": ("5",)}.items():
        (devkit / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.fromarray(np.zeros((70, 90, 3), np.uint8)).save(devkit / "JPEGImages" / f"{name}.jpg")
            Image.fromarray(np.ones((70, 90), np.uint8)).save(devkit / "SegmentationClass" / f"{name}.png")


def write_reddit(root: Path) -> None:
    (root / "raw").mkdir(parents=True)
    arrays = {"feature": np.ones((6, 3), np.float32), "label": np.array([0, 1] * 3)}
    np.savez(root / reddit.FILES[0], node_types=np.array([1, 1, 1, 1, 2, 3]), **arrays)
    ring = (np.ones(6), (np.arange(6), (np.arange(6) + 1) % 6))
    scipy.sparse.save_npz(root / reddit.FILES[1], scipy.sparse.coo_matrix(ring, shape=(6, 6)))


WRITE = {"cola": write_cola, "imagenet": write_imagenet, "voc": write_voc, "reddit": write_reddit}
# A damaged file of each, and the words that name it.
DAMAGED = {
    "cola": (FILES[1], "in_domain_dev.tsv, line 1: expected 4 tab-separated columns"),
    "imagenet": ("val/n01443537/n01443537.JPEG", "cannot read the picture"),
    "voc": (f"{voc.DEVKIT}/SegmentationClass/5.png", "SegmentationClass/5.png"),
    "reddit": (reddit.FILES[0], "cannot read a graph"),
}
READ = {
    "cola": "read batches to train on: 1, the first of input_ids (4, 6), attention_mask (4, 6), labels (4,)",
    "imagenet": "read batches to train on: 1, the first of images (2, 3, 32, 32), targets (2,)",
    "voc": "read batches to train on: 1, the first of images (4, 3, 64, 64), targets (4, 64, 64)",
    "reddit": "read batches to train on: 1, the first of inner (",
}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Empty caches of every library, and nothing to fetch from."""
    monkeypatch.setattr(needs, "reachable", lambda url: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch" / "hub"))
    monkeypatch.setattr(torch_geometric(), "get_home_dir", lambda: str(tmp_path / "pyg"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *names: {}[names])


@pytest.mark.parametrize("task", TASKS)
def test_mini_brings_its_own_and_says_so(task, clipbench, capsys, tmp_path):
    for flags in ([], ["--check"]):
        assert clipbench("prepare", f"task={task}", "preset=mini", *flags) == 0
        told = capsys.readouterr()
        assert told.out.splitlines() == [
            f"task={task} preset=mini",
            "brings its own data: nothing to prepare",
        ]
        assert told.err == ""
    assert list(tmp_path.iterdir()) == []


MISSING = {
    "cola": ["CoLA", "the model 'bert-base-uncased'"],
    "imagenet": [
        "ImageNet cannot be fetched: its licence asks each user to register at https://image-net.org"
    ],
    "voc": ["VOC2012"],
    "reddit": ["Reddit"],
}


@pytest.mark.parametrize("task", MISSING)
def test_check_says_what_is_missing_and_where_it_looked(task, clipbench, no_network, capsys, tmp_path):
    assert clipbench("prepare", f"task={task}", "--check") == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"task={task} preset=paper"
    for line, words in zip(lines, MISSING[task], strict=True):
        assert line.startswith(f"missing: {words}")
        assert "data_dir=<folder" in line or "task.model.name_or_path=<folder" in line
        assert "looked in /" in line or task == "imagenet"
        assert "not fetched yet" in line or task == "imagenet"
        assert "fetches it from https://" in line or task == "imagenet"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", MISSING)
def test_without_a_network_one_message_for_each_missing_part(task, clipbench, no_network, capsys, tmp_path):
    assert clipbench("prepare", f"task={task}") == 1
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert len(lines) == len(MISSING[task])
    for line in lines:
        assert line.startswith("clipbench: ")
        assert "preset=mini" in line
        assert "no network, and no earlier download" in line or "https://image-net.org" in line
    assert "read" not in told.out
    assert list(tmp_path.iterdir()) == []


def test_the_weights_of_an_encoder_are_a_part_of_their_own(clipbench, no_network, capsys):
    assert clipbench("prepare", "task=voc", "preset=reference", "--check") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("missing: the imagenet weights of resnet34, not fetched yet; looked in /")
    assert lines[2].endswith("or task.model.encoder_weights=null for an encoder from scratch")


@pytest.mark.parametrize("task", WRITE)
def test_a_given_folder_is_found_and_read(task, clipbench, no_network, capsys, tmp_path):
    root = tmp_path / "set"
    WRITE[task](root)
    # Small ones, which take the same path.
    argv = {"voc": VOC, "reddit": [*REDDIT, "task.batch_size=4"]}.get(task, [f"task={task}"])
    argv = ["prepare", *argv, f"data_dir={root}", "preset=mini", "task.batch_size=4"]
    assert clipbench(*argv, "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [f"{MISSING[task][0].split()[0]}: {root}"]
    assert clipbench(*argv) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[1:-1] == lines[1:]
    assert told.out.splitlines()[-1].startswith(READ[task])

    name, words = DAMAGED[task]
    (root / name).write_bytes(b"cut off")
    assert clipbench(*argv, "--check") == 0  # it looks, and does not read
    capsys.readouterr()
    assert clipbench(*argv) == 1
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1
    (root / name).unlink()
    capsys.readouterr()
    if task != "imagenet":  # whose pictures are as many as there are
        assert clipbench(*argv, "--check") == 1
        assert Path(name).name in capsys.readouterr().out


def test_a_wrong_folder_is_told_the_right_one(clipbench, capsys, tmp_path):
    write_cola(tmp_path / "sets" / "cola")
    argv = ["prepare", "task=cola", "preset=mini", f"data_dir={tmp_path / 'sets'}"]
    for flags in ([], ["--check"]):
        assert clipbench(*argv, *flags) == 1
        told = capsys.readouterr()
        assert f"give data_dir={tmp_path / 'sets' / 'cola'}" in told.out + told.err


# Fetching, by the libraries, from a server of our own


@pytest.fixture
def server(tmp_path):
    """Serves ``tmp_path / "served"``; gives its address."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    serve = functools.partial(Silent, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def empty_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch" / "hub"))
    monkeypatch.setattr(torch_geometric(), "get_home_dir", lambda: str(tmp_path / "pyg"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_voc_is_fetched_by_torchvision_once(clipbench, server, empty_caches, monkeypatch, capfd, tmp_path):
    write_voc(tmp_path / "original")
    archive = tmp_path / "served" / "VOCtrainval.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(tmp_path / "original" / "VOCdevkit", "VOCdevkit")
    published = voc.DATASET_YEAR_DICT["2012"] | {
        "url": f"{server}/{archive.name}",
        "filename": archive.name,
        "md5": hashlib.md5(archive.read_bytes()).hexdigest(),
    }
    monkeypatch.setitem(voc.DATASET_YEAR_DICT, "2012", published)
    monkeypatch.setattr(voc, "URL", published["url"])

    content = archive.read_bytes()
    archive.write_bytes(content[:-1000])
    assert clipbench("prepare", *VOC) == 1
    assert "cannot get VOC2012: File not found or corrupted" in capfd.readouterr().err
    assert list(voc.downloads().iterdir()) == []

    archive.write_bytes(content)
    assert clipbench("prepare", *VOC) == 0
    told = capfd.readouterr().out.splitlines()
    assert told[1] == f"fetching VOC2012 from {published['url']}"
    assert told[-2] == f"VOC2012: {voc.downloads()}"
    shapes = "images (2, 3, 64, 64), targets (2, 64, 64)"
    assert told[-1] == f"read batches to train on: 2, the first of {shapes}; to evaluate on: 1"
    archive.unlink()
    for flags in ([], ["--check"]):
        assert clipbench("prepare", *VOC, *flags) == 0
        assert "fetching" not in capfd.readouterr().out
    next(voc.downloads().rglob("5.png")).unlink()
    assert clipbench("prepare", *VOC, "--check") == 1


def test_reddit_is_fetched_by_pyg_once(clipbench, server, empty_caches, monkeypatch, capfd, tmp_path):
    write_reddit(tmp_path / "original")
    archive = tmp_path / "served" / "reddit.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in reddit.FILES:
            packed.write(tmp_path / "original" / name, Path(name).name)
    monkeypatch.setattr(torch_geometric().datasets.Reddit, "url", f"{server}/reddit.zip")
    monkeypatch.setattr(reddit, "URL", f"{server}/reddit.zip")

    content = archive.read_bytes()
    archive.write_bytes(content[:500])
    assert clipbench("prepare", *REDDIT) == 1
    assert "cannot get Reddit: File is not a zip file" in capfd.readouterr().err
    archive.write_bytes(content)
    assert clipbench("prepare", *REDDIT) == 0
    told = capfd.readouterr().out.splitlines()
    assert told[-2] == f"Reddit: {tmp_path / 'pyg' / 'Reddit'}"
    assert told[-1].startswith("read batches to train on: 2, the first of inner")
    assert {path.name for path in (tmp_path / "pyg" / "Reddit" / "raw").iterdir()} == {
        Path(name).name for name in reddit.FILES
    }
    archive.unlink()
    assert clipbench("prepare", *REDDIT, "--check") == 0
    shutil.rmtree(tmp_path / "pyg")
    assert clipbench("prepare", *REDDIT, "--check") == 1


# Bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preset=mini"], "say which task: clipbench prepare task=NAME; choose one of cola, expectation"),
        (
            ["task=colla"],
            "there is no task 'colla'; choose one of cola, expectation, imagenet, quadratic, reddit",
        ),
        (["task=cola", "preset=papre"], "it has frozen, mini, paper, reference. Did you mean 'paper'?"),
        (["task=cola", "--chek"], "takes KEY=VALUE and --check, got '--chek'. Did you mean '--check'?"),
        (["cola"], "takes KEY=VALUE and --check, got 'cola'."),
        (["~task", "task=cola"], "takes KEY=VALUE and --check, got '~task'."),
        (["task=cola,voc"], "task=cola,voc: several values make a sweep"),
        (["task=cola", "task.batch_size=0"], "batch_size must be a whole number of at least 1, got 0"),
        (["task=cola", "dat_dir=x"], "there is no key 'dat_dir'; choose one of"),
        (["task=voc", "task.model.encoder_weights=imagnet"], "must be one of null, imagenet, got 'imagnet'"),
        (["task=quadratic", "data_dir=x"], "task quadratic has no data that data_dir=x could replace"),
        (
            ["task=cola", "data_dir=2024", "preset=mini", "task.model=3"],
            "model takes name_or_path and config, got 3",
        ),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_bad_input_gets_one_message(argv, flags, message, clipbench, no_network, capsys, tmp_path):
    assert clipbench("prepare", *argv, *flags) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help(clipbench, capsys):
    assert clipbench("prepare", "--help") == 0
    assert clipbench("prepare") == 2
    assert capsys.readouterr().out == 2 * PREPARE_HELP
    assert max(map(len, PREPARE_HELP.splitlines())) <= 110


# Real data

FOLDERS = {
    "cola": ("cola_public/cola_public", "read batches to train on: 99"),
    "imagenet": ("imagenet_subset", "read batches to train on: 62"),
    "voc": ("voc2012_subset", "read batches to train on: 10"),
    "reddit": ("graph_github_redditformat", "read batches to train on: 388"),
}


@pytest.mark.skipif(
    "CLIPBENCH_DATA" not in os.environ, reason="needs CLIPBENCH_DATA, a folder of unpacked sets"
)
@pytest.mark.parametrize("task", FOLDERS)
def test_real_data(task, clipbench, capsys):
    folder, read = FOLDERS[task]
    root = Path(os.environ["CLIPBENCH_DATA"], folder)
    argv = ["prepare", f"task={task}", "preset=mini", f"data_dir={root}"]
    assert clipbench(*argv, "--check") == 0
    assert clipbench(*argv) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-2].endswith(f": {root}")
    assert told[-1].startswith(read)
