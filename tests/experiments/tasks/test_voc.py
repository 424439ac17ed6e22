"""The VOC task: pictures with masks, void, the published layout, weights, messages, and that it learns."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.nn import functional as F
from torchvision import tv_tensors

from experiments.errors import UserError
from experiments.tasks import needs, voc
from experiments.tasks.images import Pictures, drawn_from, normalise
from experiments.tasks.voc import CLASSES, GREY, VOC, VOID, fit, train_transform
from experiments.training.presets import conf_dir

CPU = torch.device("cpu")
LIGHT = {"encoder_name": "tu-mobilenetv3_small_050", "encoder_depth": 3, "decoder_channels": [16, 16, 8]}
PERSON, CAT = CLASSES.index("person"), CLASSES.index("cat")


def preset(name: str, **settings):
    """The preset and the task that Hydra composes of it, with nothing resolved yet."""
    config = OmegaConf.create(
        {
            "data_dir": None,
            "preset": OmegaConf.load(conf_dir() / f"preset/voc/{name}.yaml"),
            "task": OmegaConf.load(conf_dir() / "task/voc.yaml"),
        }
    )
    for key, value in settings.items():
        OmegaConf.update(config.task, key, value)
    return config


def small_task(**changes) -> VOC:
    settings = {"model": LIGHT, "image_size": 64, "batch_size": 4, "num_train": 12, "num_val": 20, **changes}
    task = VOC(**settings)
    task.load()
    return task


def save_pair(devkit: Path, name: str, size: tuple[int, int], kind: int) -> None:
    """A picture as red as its class says, with the class in a box whose outline is void."""
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    mask[10:-10, 10:-10] = VOID
    mask[12:-12, 12:-12] = kind
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 10 * np.where(mask == VOID, 0, mask)
    Image.fromarray(pixels).save(devkit / "JPEGImages" / f"{name}.jpg", quality=100, subsampling=0)
    stored = Image.fromarray(mask, mode="P")
    stored.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    stored.save(devkit / "SegmentationClass" / f"{name}.png")


def write_devkit(root: Path) -> Path:
    devkit = root / voc.DEVKIT
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    splits = {"train": ["2007_000001", "2007_000002"], "val": ["2008_000001"]}
    for split, names in splits.items():
        (devkit / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    save_pair(devkit, "2007_000001", (100, 75), CAT)
    save_pair(devkit, "2007_000002", (75, 100), PERSON)
    save_pair(devkit, "2008_000001", (50, 40), CAT)
    return root


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return write_devkit(tmp_path / "sets" / "voc")


# Configuration


@pytest.mark.parametrize("name", ["mini", "paper", "reference"])
def test_presets_give_the_task_its_settings(name):
    task = instantiate(preset(name).task)
    assert isinstance(task, VOC)
    assert task.input_files() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "downlod"},
            "source must be embedded or download, got 'downlod'. Did you mean 'download'?",
        ),
        ({"model": {"encoder": "x"}}, "got 'encoder'. Did you mean 'encoder_name'?"),
        ({"model": {"encoder_depth": 4}}, "model.decoder_channels must be 4 numbers, as model.encoder_depth"),
        ({"model": {**LIGHT, "decoder_channels": [8, 8, "a"]}}, "at least 1, got 'a'"),
        ({"channels_last": "yes"}, "channels_last must be true or false, got 'yes'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"image_size": 16}, "image_size must be a whole number of at least 32, got 16"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        VOC(**{"model": LIGHT, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, "image_size must be a multiple of 2^encoder_depth = 8, got 100"),
        ({"model": {"encoder_name": "resnet43"}}, "no encoder 'resnet43'. Did you mean 'resnet34'?"),
        ({"model": {**LIGHT, "encoder_name": "tu-nothing"}}, "model makes no U-Net: Unknown model (nothing)"),
        (
            {"model": {"encoder_weights": "imagnet"}},
            "model.encoder_weights of resnet34 must be one of null, imagenet, got 'imagnet'",
        ),
        ({"model": {**LIGHT, "encoder_weights": "imagenet"}}, "must be one of null, got 'imagenet'"),
    ],
)
def test_what_makes_no_network_is_refused_in_loading(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        small_task(**settings)


# Pictures and their masks


class Coded:
    """Pictures in which every pixel's red is ten times its class."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        mask = np.zeros((60, 90), np.uint8)
        mask[10 + index : 40, 20:70] = 20
        pixels = np.stack([10 * mask, mask * 0, mask * 0], axis=2)
        return Image.fromarray(pixels), tv_tensors.Mask(mask)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_picture_and_its_mask_are_moved_together(size):
    pictures = Pictures(Coded(), train_transform(size), seed=0)
    agree, shares = [], []
    for epoch in range(5):
        pictures.set_epoch(epoch)
        batch = pictures.__getitems__(list(range(8)))
        red, mask = batch["images"][:, 0], batch["targets"]
        assert red.shape == mask.shape == (8, size, size)
        agree.append(((red > 100) == (mask == 20))[mask != VOID].float().mean())
        shares.append((mask == VOID).float().mean((1, 2)))
        padding = batch["images"].permute(0, 2, 3, 1)[mask == VOID]
        assert (padding == torch.tensor(GREY)).all()
    assert min(agree) > 0.94  # edges are blurred in the one and not in the other
    assert torch.cat(shares).std() > 0.05  # some are shrunk and padded, some are not


def test_pairs_are_mirrored_and_scaled_by_the_key_alone():
    transform = train_transform(64)
    drawn = []
    for key in (0, 1, 0):
        with drawn_from(key):
            picture, mask = transform(*Coded()[0])
        drawn.append((np.asarray(picture).tobytes(), mask.numpy().tobytes()))
    assert drawn[0] == drawn[2]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


def test_evaluation_pads_what_is_small_and_shrinks_what_is_large():
    picture, mask = Coded()[0]
    whole, padded = fit(picture, mask, 96)
    assert whole.size == (96, 96)
    assert torch.equal(padded[:60, :90], mask)
    assert np.array_equal(np.asarray(whole)[:60, :90], np.asarray(picture))
    assert (padded[60:] == VOID).all()
    assert (padded[:, 90:] == VOID).all()
    small, shrunk = fit(picture, mask, 45)
    assert small.size == (45, 45)
    assert torch.equal(shrunk[:30], mask[1::2, 1::2])
    assert (shrunk[30:] == VOID).all()


# Loss and metrics


def test_void_pixels_count_neither_in_the_loss_nor_in_the_metrics():
    task = small_task()
    model = task.build_model().eval()
    batch = next(iter(task.train_loader(0)))
    output = task.forward(model, batch)
    logits = model(normalise(batch["images"], torch.channels_last)).detach()
    known = batch["targets"] != VOID
    targets = batch["targets"][known].long()
    flat = logits.permute(0, 2, 3, 1)[known]
    torch.testing.assert_close(output.loss.detach(), F.cross_entropy(flat, targets))
    assert output.size == len(batch["images"])
    assert output.tally.sum() == known.sum()
    assert output.tally.diagonal().sum() == (flat.argmax(1) == targets).sum()


def test_metrics_come_from_one_matrix_of_the_whole_set():
    task = small_task()
    tallies = []
    for batch in task.eval_loader():
        everything_background = torch.zeros_like(batch["targets"], dtype=torch.int64)
        matrix = voc.confusion_matrix(everything_background, batch["targets"].long(), 5, VOID)
        tallies.append(matrix)
    assert len(tallies) == 2
    metrics = task.metrics(sum(tallies))
    share = metrics["pixel_accuracy"]
    assert metrics["miou"] == pytest.approx(share / 5)  # the floor: one class right, four at 0
    assert metrics["iou/background"] == share
    assert [metrics[f"iou/{name}"] for name in ("disc", "square", "triangle", "cross")] == [0.0] * 4


def test_a_class_that_is_nowhere_has_no_iou_and_lowers_no_mean(data_dir):
    task = small_task(data_dir=str(data_dir))
    tally = torch.zeros(21, 21, dtype=torch.int64)
    tally[0, 0], tally[0, CAT], tally[CAT, CAT] = 50, 25, 25
    metrics = task.metrics(tally)
    assert metrics["iou/cat"] == 0.5
    assert metrics["miou"] == pytest.approx((50 / 75 + 0.5) / 2)
    assert set(metrics) == {"miou", "pixel_accuracy", "iou/background", "iou/cat"}


def test_the_layout_in_memory_changes_no_result():
    losses = []
    for channels_last in (True, False):
        task = small_task(channels_last=channels_last)
        torch.manual_seed(0)
        model = task.build_model().eval()
        weight = model.segmentation_head[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        losses.append(task.forward(model, next(iter(task.train_loader(0)))).loss)
    torch.testing.assert_close(*losses)


# VOC as published


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_data_dir_replaces_the_data_of_any_preset(data_dir, name):
    config = preset(name, num_workers=0)
    config.data_dir = str(data_dir)
    task = instantiate(config.task)
    task.load()
    (batch,) = task.eval_loader()
    size = config.preset.image_size
    assert batch["images"].shape == (1, 3, size, size)
    assert sorted(batch["targets"].unique().tolist()) == [0, CAT, VOID]
    assert task.build_model().segmentation_head[0].out_channels == 21


def test_pictures_keep_their_masks(data_dir):
    task = small_task(data_dir=str(data_dir), image_size=128)
    (batch,) = task.eval_loader()
    mask = batch["targets"]
    red = batch["images"][:, 0].float() / 10
    assert (abs(red - mask)[mask != VOID] < 0.5).all()
    assert len(task.input_files()) == 2 + 2 * 3


@pytest.mark.parametrize("step", ["VOCdevkit", "VOCdevkit/VOC2012", "..", "../.."])
def test_a_neighbouring_folder_is_told_the_right_one(data_dir, step):
    with pytest.raises(UserError, match=re.escape(f"give data_dir={data_dir}")):
        VOC(model=LIGHT, data_dir=str((data_dir / step).resolve())).input_files()


def test_missing_parts_are_named(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"must hold VOCdevkit/VOC2012 .*there is no folder /no/such"):
        small_task(data_dir="/no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"missing in .*empty: VOCdevkit/VOC2012/"):
        small_task(data_dir=str(tmp_path / "empty"))
    devkit = data_dir / voc.DEVKIT
    (devkit / "SegmentationClass" / "2007_000002.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 6 files .* missing, .*2007_000002\.png for one"):
        small_task(data_dir=str(data_dir))
    (devkit / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(UserError, match=r"missing in .*: VOCdevkit.*Segmentation/val\.txt"):
        small_task(data_dir=str(data_dir))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((40, 50, 3), np.uint8), "must hold class numbers, as a palette picture does"),
        (np.zeros((50, 40), np.uint8), r"is \(40, 50\), its picture \(50, 40\) pixels"),
        (np.full((40, 50), 21, np.uint8), "must hold 0 to 20, or 255 for void, got 21"),
        (None, "cannot read the picture .*2008_000001.png"),
    ],
)
def test_an_odd_mask_is_named(data_dir, mask, message):
    path = data_dir / voc.DEVKIT / "SegmentationClass" / "2008_000001.png"
    if mask is None:
        path.write_bytes(b"")
    else:
        Image.fromarray(mask).save(path)
    task = small_task(data_dir=str(data_dir))
    with pytest.raises(UserError, match=message) as caught:
        list(task.eval_loader())
    assert str(path) in str(caught.value)


# Download


@pytest.fixture
def torch_home(tmp_path, monkeypatch) -> Path:
    """A cache of torch's with nothing in it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch" / "hub"))
    return tmp_path / "torch"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(request, timeout):
        assert timeout <= 10
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_without_data_and_network_the_message_says_where_it_looked_and_the_ways_on(torch_home, no_network):
    expected = rf"{re.escape(voc.URL)} and in {torch_home}.*Ways on: data_dir=.*network.*preset=mini"
    with pytest.raises(UserError, match=expected) as caught:
        small_task(source="download")
    assert "no network, and no earlier download" in str(caught.value)
    assert not torch_home.exists()


def test_a_download_is_kept_and_not_asked_for_again(torch_home, no_network, monkeypatch):
    unpacked = []

    def unpack(url, root, filename, md5):
        assert (url, md5) == (voc.URL, "6cd6e144f989b92b3379bac3b3de84fd")
        unpacked.append(write_devkit(Path(root)))

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", unpack)
    monkeypatch.setattr(needs, "reachable", lambda url: url == voc.URL)
    (need,) = VOC(model=LIGHT, source="download").needs()
    assert (need.place, need.problem) == (voc.downloads(), "not fetched yet")
    task = small_task(source="download")
    assert len(list(task.eval_loader())) == 1
    assert task.input_files() == []
    monkeypatch.setattr(needs, "reachable", lambda url: pytest.fail("asked again"))
    small_task(source="download")
    (need,) = task.needs()
    assert (need.place, need.problem) == (voc.downloads(), None)
    assert len(unpacked) == 1
    assert [path.name for path in voc.downloads().iterdir()] == ["VOCdevkit"]


def test_a_failed_download_leaves_nothing_that_looks_whole(torch_home, monkeypatch):
    def unpack(url, root, filename, md5):
        (Path(root) / voc.DEVKIT).mkdir(parents=True)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", unpack)
    monkeypatch.setattr(needs, "reachable", lambda url: True)
    with pytest.raises(UserError, match="cannot get VOC2012: File not found or corrupted"):
        small_task(source="download")
    assert list(voc.downloads().iterdir()) == []


def test_data_dir_and_mini_ask_no_network(data_dir, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked the network"))
    small_task()
    small_task(source="download", data_dir=str(data_dir))


# Pretrained encoders


def test_weights_without_network_fail_at_once_with_the_ways_on(no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match=r"imagenet weights of resnet34: no network.*encoder_weights=null"):
        small_task(model={"encoder_weights": "imagenet"})


def test_weights_are_put_into_the_encoder(no_network, monkeypatch, tmp_path):
    from safetensors.torch import save_file
    from segmentation_models_pytorch import encoders

    asked = []

    def fetch(repo_id, filename, revision):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    weights = encoders.get_encoder("resnet18").state_dict()
    weights["conv1.weight"].fill_(0.25)
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(encoders, "hf_hub_download", fetch)
    here = str(tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: here)
    task = small_task(model={"encoder_name": "resnet18", "encoder_weights": "imagenet"})
    (need,) = task.needs()
    assert (need.what, need.place) == ("the imagenet weights of resnet18", tmp_path)
    assert asked == []
    model = task.build_model()
    assert ("smp-hub/resnet18.imagenet", "model.safetensors") in asked
    assert (model.encoder.conv1.weight == 0.25).all()
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot use the imagenet weights of resnet18"):
        task.build_model()


# Learning


def train(task: VOC, seed: int, steps: int, lr: float) -> float:
    """Train with momentum, the norm clipped at 1, and linear decay; the mean IoU at the end."""
    torch.manual_seed(seed)
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    loader = task.train_loader(seed)
    for step in range(steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        optimizer.zero_grad()
        task.forward(model, next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return task.evaluate(model, CPU)[1]["miou"]


def test_a_small_set_is_learned_by_heart():
    task = small_task(num_train=8, batch_size=8)
    task._val_set = task._train_set
    assert train(task, seed=0, steps=40, lr=0.1) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_mini_preset_learns_and_leaves_room(seed):
    config = preset("mini")
    task = instantiate(config.task)
    task.load()
    assert 0.6 < train(task, seed, config.preset.max_steps, config.preset.lr.sgd) < 0.95


# Real pictures


@pytest.mark.skipif(
    "CLIPBENCH_DATA" not in os.environ, reason="needs CLIPBENCH_DATA, a folder of unpacked sets"
)
def test_real_pictures():
    data_dir = os.path.join(os.environ["CLIPBENCH_DATA"], "voc2012_subset")
    task = small_task(data_dir=data_dir, image_size=512, num_workers=2)
    assert len(task.input_files()) == 2 + 2 * (84 + 42)
    background = known = 0
    for batch in task.eval_loader():
        masks = batch["targets"]
        known += int((masks != VOID).sum())
        background += int((masks == 0).sum())
    assert background / known == pytest.approx(0.714, abs=0.001)
    batch = next(iter(task.train_loader(0)))
    assert task.forward(task.build_model(), batch).loss.item() == pytest.approx(3.0, abs=1.0)  # log 21
