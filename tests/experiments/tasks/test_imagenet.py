"""The ImageNet task: folders as they come, the network, its metrics, messages, and that it learns."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.nn import functional as F
from torchvision.models import resnet18

from experiments.errors import UserError
from experiments.tasks.imagenet import ImageNet, narrow_resnet18
from experiments.tasks.images import normalise, open_rgb
from experiments.training.presets import conf_dir

CPU = torch.device("cpu")
SMALL = {"width": 4, "stem": "small"}
WNIDS = ["n01440764", "n01443537", "n02125311"]


def preset(name: str, **settings):
    """The preset and the task that Hydra composes of it, with nothing resolved yet."""
    config = OmegaConf.create(
        {
            "data_dir": None,
            "preset": OmegaConf.load(conf_dir() / f"preset/imagenet/{name}.yaml"),
            "task": OmegaConf.load(conf_dir() / "task/imagenet.yaml"),
        }
    )
    for key, value in settings.items():
        OmegaConf.update(config.task, key, value)
    return config


def small_task(**changes) -> ImageNet:
    settings = {"model": SMALL, "image_size": 32, "batch_size": 8, "num_train": 60, "num_val": 40, **changes}
    task = ImageNet(**settings)
    task.load()
    return task


def save_picture(path: Path, brightness: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), brightness, np.uint8)).save(path, format="JPEG")


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Three classes; a picture is as bright as its class says: 40, 80, 120."""
    root = tmp_path / "sets" / "tiny"
    for place, wnid in enumerate(WNIDS):
        for number in range(3):
            save_picture(root / "train" / wnid / f"{wnid}_{number}.JPEG", 40 * (place + 1))
        save_picture(root / "val" / wnid / "images" / f"val_{place}.JPEG", 40 * (place + 1))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return root


# Configuration


@pytest.mark.parametrize("name", ["mini", "paper", "reference"])
def test_presets_give_the_task_its_settings(name):
    task = instantiate(preset(name).task)
    assert isinstance(task, ImageNet)
    assert task.input_files() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "embeded"},
            "source must be embedded or data_dir, got 'embeded'. Did you mean 'embedded'?",
        ),
        ({"model": {"widht": 8}}, "model takes width, stem, got 'widht'. Did you mean 'width'?"),
        ({"model": "resnet18"}, "model takes width, stem, got 'resnet18'"),
        (
            {"model": {"stem": "smal"}},
            "model.stem must be standard or small, got 'smal'. Did you mean 'small'?",
        ),
        ({"model": {"width": 0}}, "model.width must be a whole number of at least 1, got 0"),
        ({"channels_last": "yes"}, "channels_last must be true or false, got 'yes'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0, got -1"),
        ({"image_size": 8}, "image_size must be a whole number of at least 16, got 8"),
        ({"min_crop": 0}, "min_crop must be a number in (0, 1], got 0"),
        ({"min_crop": 1.5}, "min_crop must be a number in (0, 1], got 1.5"),
        (
            {"classes": "list.txt"},
            "classes=list.txt chooses among the folders of data_dir, which is not given",
        ),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ImageNet(**{"model": SMALL, **settings})


@pytest.mark.parametrize("name", ["paper", "reference"])
def test_without_data_the_message_says_why_and_the_ways_on(name):
    with pytest.raises(UserError, match=r"licence.*image-net\.org.*data_dir=.*task\.classes=.*preset=mini"):
        instantiate(preset(name).task).load()


def test_what_is_needed(data_dir):
    (need,) = instantiate(preset("paper").task).needs()
    assert (need.what, need.place, need.fetch) == ("ImageNet", None, None)
    assert "licence" in need.problem
    (need,) = instantiate(preset("paper", data_dir=str(data_dir)).task).needs()
    assert (need.place, need.problem) == (data_dir, None)
    (data_dir / "val" / WNIDS[1]).rename(data_dir / "elsewhere")
    (need,) = instantiate(preset("paper", data_dir=str(data_dir)).task).needs()
    assert f"val lacks 1 of 3 class folders, '{WNIDS[1]}' for one" in need.problem
    assert instantiate(preset("mini").task).needs() == []


# Folders


@pytest.mark.parametrize("name", ["mini", "paper"])
def test_data_dir_replaces_the_data_of_any_preset(data_dir, name):
    config = preset(name, num_workers=0)
    config.data_dir = str(data_dir)
    task = instantiate(config.task)
    task.load()
    (batch,) = task.eval_loader()
    size = config.preset.image_size
    assert batch["images"].shape == (3, 3, size, size)
    assert batch["targets"].tolist() == [0, 1, 2]
    assert task.build_model().fc.out_features == 3


def test_pictures_keep_their_labels(data_dir):
    task = small_task(data_dir=str(data_dir), batch_size=9)
    (train,) = task.train_loader(0)
    (val,) = task.eval_loader()
    for batch in (train, val):
        brightness = batch["images"].float().mean((1, 2, 3))
        assert torch.equal((brightness / 40).round().long() - 1, batch["targets"])
    assert len(task.input_files()) == 12


def test_a_class_list_chooses_and_numbers_the_classes(data_dir):
    chosen = data_dir / "chosen.txt"
    chosen.write_text("n02125311 puma, cougar\n\nn01440764\nn02125311\n")
    task = small_task(data_dir=str(data_dir), classes=str(chosen))
    (val,) = task.eval_loader()
    brightness = (val["images"].float().mean((1, 2, 3)) / 40).round().long()
    assert dict(zip(val["targets"].tolist(), brightness.tolist(), strict=True)) == {0: 3, 1: 1}
    files = task.input_files()
    assert files[0] == chosen
    assert len(files) == 1 + 6 + 2
    assert not any("n01443537" in str(file) for file in files)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\nn0244353\n", r"train lacks 1 of 2 class folders, 'n0244353' for one. Did you mean"),
        ("", "must name a class folder in each line, and is empty"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_class_list_that_does_not_fit_is_refused(data_dir, text, message):
    chosen = data_dir / "chosen.txt"
    if text is not None:
        chosen.write_text(text)
    with pytest.raises(UserError, match=message):
        small_task(data_dir=str(data_dir), classes=str(chosen))


@pytest.mark.parametrize("step", ["train", "..", "../.."])
def test_a_neighbouring_folder_is_told_the_right_one(data_dir, step):
    with pytest.raises(UserError, match=re.escape(f"give data_dir={data_dir}")):
        ImageNet(model=SMALL, data_dir=str((data_dir / step).resolve())).input_files()


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"must hold train/ and val/.*there is no folder /no/such/folder"):
        small_task(data_dir="/no/such/folder")


def test_missing_parts_are_named(data_dir):
    (data_dir / "val" / WNIDS[1] / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=f"val: Found no valid file for the classes {WNIDS[1]}"):
        small_task(data_dir=str(data_dir))
    (data_dir / "val" / WNIDS[1] / "images").rmdir()
    (data_dir / "val" / WNIDS[1]).rmdir()
    with pytest.raises(UserError, match=f"val lacks 1 of 3 class folders, '{WNIDS[1]}' for one"):
        small_task(data_dir=str(data_dir))
    (data_dir / "val").rename(data_dir / "validation")
    with pytest.raises(UserError, match=r"missing in .*tiny: val$"):
        small_task(data_dir=str(data_dir))
    save_picture(data_dir / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(UserError, match="holds none; pictures that lie there loose must be sorted"):
        small_task(data_dir=str(data_dir))


def test_an_unreadable_picture_is_named(data_dir):
    broken = data_dir / "val" / WNIDS[0] / "images" / "val_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    task = small_task(data_dir=str(data_dir))
    with pytest.raises(UserError) as caught:
        task.evaluate(task.build_model(), CPU)
    assert str(caught.value).startswith(f"cannot read the picture {broken}: ")
    assert "\n" not in str(caught.value)


# The network


def test_full_width_is_torchvisions_resnet18():
    torch.manual_seed(0)
    ours = instantiate(preset("reference", channels_last=False).task)
    ours._num_classes = 1000
    model = ours.build_model()
    torch.manual_seed(0)
    theirs = resnet18()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("stem", ["standard", "small"])
def test_a_narrow_one_has_the_same_parts_drawn_the_same_way(stem):
    torch.manual_seed(0)
    model = narrow_resnet18(10, 16, stem)
    wide = resnet18(num_classes=10)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in wide.named_parameters()]
    for name, weight in model.named_parameters():
        assert not weight.is_meta
        other = wide.get_parameter(name)
        if weight.dim() == 4 and name != "conv1.weight":
            assert weight.shape == (other.shape[0] // 4, other.shape[1] // 4, *other.shape[2:])
            # He's initialisation: the deviation is sqrt(2 / fan_out), 4 being the ratio of widths.
            assert weight.std().item() == pytest.approx(2 * other.std().item(), rel=0.15)
        elif weight.dim() == 1 and not name.startswith("fc"):
            assert weight.unique().tolist() == other.unique().tolist()
    side = {"standard": 4, "small": 2}[stem]
    features = torch.nn.Sequential(*list(model.children())[:-2])(
        torch.zeros(2, 3, 32 * side // 2, 32 * side // 2)
    )
    assert features.shape == (2, 128, 2, 2)


def test_the_layout_in_memory_changes_no_result():
    outputs = []
    for channels_last in (True, False):
        task = small_task(channels_last=channels_last)
        torch.manual_seed(0)
        model = task.build_model()
        weight = model.layer2[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        outputs.append(task.forward(model, next(iter(task.train_loader(0)))))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)


# Metrics


def test_forward_gives_the_mean_loss_and_counts_hits():
    task = small_task(batch_size=40)
    model = task.build_model().eval()
    batch = next(iter(task.train_loader(0)))
    output = task.forward(model, batch)
    logits = model(normalise(batch["images"], torch.channels_last)).detach()
    labels = batch["targets"]
    torch.testing.assert_close(output.loss.detach(), F.cross_entropy(logits, labels))
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert output.tally.tolist() == [40, int((ranks == 0).sum()), int((ranks < 5).sum())]
    assert output.size == 40


def test_top5_is_told_where_half_the_classes_are_not_in_it():
    task = small_task()
    tally = torch.tensor([200, 50, 120])
    assert task.metrics(tally) == {"accuracy": 0.25}
    task._num_classes = 100
    assert task.metrics(tally) == {"accuracy": 0.25, "top5_accuracy": 0.6}


class Constant(torch.nn.Module):
    """The same answer to every picture."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(F.one_hot(torch.tensor(answer), 10).float())

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def test_a_constant_answer_scores_the_floor():
    task = small_task(num_val=200)
    assert task.evaluate(Constant(3), CPU)[1] == {"accuracy": 0.1}


# Learning


def train(task: ImageNet, seed: int, steps: int, lr: float) -> float:
    """Train with momentum, the norm clipped at 1, and linear decay; the accuracy at the end."""
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
    return task.evaluate(model, CPU)[1]["accuracy"]


def test_a_small_set_is_learned_by_heart():
    task = small_task(num_train=40, batch_size=20, min_crop=0.6, model={"width": 8, "stem": "small"})
    task._val_set = task._train_set
    assert train(task, seed=0, steps=100, lr=0.2) > 0.9


def test_training_repeats_itself_bit_for_bit():
    weights = []
    for _ in range(2):
        task = small_task()
        torch.manual_seed(0)
        model = task.build_model()
        task.forward(model, next(iter(task.train_loader(0)))).loss.backward()
        weights.append(model.conv1.weight.grad)
    assert torch.equal(*weights)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_mini_preset_learns_and_leaves_room(seed):
    config = preset("mini")
    task = instantiate(config.task)
    task.load()
    assert 0.75 < train(task, seed, config.preset.max_steps, config.preset.lr.sgd) < 0.95


# Real pictures

needs_data = pytest.mark.skipif(
    "CLIPBENCH_DATA" not in os.environ, reason="needs CLIPBENCH_DATA, a folder of unpacked sets"
)


@needs_data
def test_real_pictures():
    task = small_task(data_dir=os.path.join(os.environ["CLIPBENCH_DATA"], "imagenet_subset"), batch_size=256)
    assert len(task.input_files()) == 2_400
    loader = task.train_loader(0)
    assert len(loader) == 2_000 // 256
    loss, metrics = task.evaluate(task.build_model(), CPU)
    assert loss == pytest.approx(3, abs=0.5)  # log 20
    assert metrics["accuracy"] < 0.2
    assert metrics["top5_accuracy"] == pytest.approx(0.25, abs=0.1)


@needs_data
def test_odd_real_pictures_are_decoded():
    folder = Path(os.environ["CLIPBENCH_DATA"], "imagenet_fullsize_sample")
    modes = [open_rgb(path).mode for path in folder.rglob("*.JPEG")]
    assert modes == ["RGB"] * 31
