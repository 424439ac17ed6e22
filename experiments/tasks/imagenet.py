"""What is in the picture? ResNet18 on ImageNet or a part of it, or on small pictures of our own."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.models.resnet import BasicBlock, ResNet, resnet18
from torchvision.transforms import v2

from experiments.errors import UserError, nearest
from experiments.tasks import needs
from experiments.tasks.base import Batch, EpochLoader, Output, Task
from experiments.tasks.images import (
    Pictures,
    check_at_least,
    check_choice,
    check_keys,
    eval_batches,
    layout,
    normalise,
    open_rgb,
    train_batches,
)
from experiments.tasks.needs import Need, in_folder, reason
from experiments.tasks.samples import imagenet as samples

SOURCES = ("embedded", "data_dir")
STEMS = ("standard", "small")
MODEL_KEYS = ("width", "stem")
SPLITS = ("train", "val")
EVAL_BATCH_SIZE = 256
FULL_WIDTH = 64
TOP = 5
RESIZE = 256 / 224  # before the central crop of evaluation, as in torchvision's recipe


class ImageNet(Task):
    """Picture classification with torchvision's ResNet18, scored by top-1 accuracy.

    Training pictures are random crops, mirrored or not; evaluation takes the central crop.

    Args:
        model: ``width``, channels of the first stage, 64 in ResNet18; ``stem``, ``standard`` or ``small``,
            which halves the picture once instead of twice.
        data_dir: folder that holds ``train/`` and ``val/``, in each a folder of pictures for each class.
            Replaces ``source`` and changes nothing else.
        source: ``embedded`` for generated pictures; ``data_dir`` where there must be one.
        classes: file that names a class folder in each line; only these are read, in this order.
            None for all.
        image_size: side of what the model is given, in pixels.
        min_crop: least share of a picture's area in a training crop.
        batch_size: pictures in a training batch.
        num_workers: processes that load pictures; 0 for none. Changes no number.
        channels_last: whether the channels of a pixel lie together in memory.
        num_train: embedded pictures to train on.
        num_val: embedded pictures to evaluate on.
    """

    metric = "accuracy"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        data_dir: str | None = None,
        source: str = "embedded",
        classes: str | None = None,
        image_size: int = 224,
        min_crop: float = 0.08,
        batch_size: int = 256,
        num_workers: int = 0,
        channels_last: bool = True,
        num_train: int = 8_000,
        num_val: int = 1_000,
    ) -> None:
        check_keys("model", model, MODEL_KEYS)
        width, stem = model.get("width", FULL_WIDTH), model.get("stem", "standard")
        check_choice("source", source, SOURCES)
        check_choice("model.stem", stem, STEMS)
        check_at_least("model.width", width, 1)
        check_at_least("image_size", image_size, 16)
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("num_train", num_train, len(samples.KINDS))
        check_at_least("num_val", num_val, len(samples.KINDS))
        if not isinstance(min_crop, int | float) or not 0 < min_crop <= 1:
            raise UserError(f"min_crop must be a number in (0, 1], got {min_crop!r}")
        if data_dir is None and classes is not None:
            raise UserError(f"classes={classes} chooses among the folders of data_dir, which is not given")
        self._source = source
        self._width, self._stem = width, stem
        self._data_dir = None if data_dir is None else Path(str(data_dir)).expanduser()
        self._classes_file = None if classes is None else Path(str(classes)).expanduser()
        self._image_size = image_size
        self._min_crop = min_crop
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._layout = layout(channels_last)
        self._num_train, self._num_val = num_train, num_val

    def input_files(self) -> list[Path]:
        if self._data_dir is None:
            return []
        lists = [] if self._classes_file is None else [self._classes_file]
        return [*lists, *(Path(path) for folder in self._folders for path, _ in folder.samples)]

    def needs(self) -> list[Need]:
        if self._data_dir is not None:
            look = functools.partial(class_names, classes_file=self._classes_file)
            return [in_folder("ImageNet", self._data_dir, look)]
        return [Need("ImageNet", None, MISSING)] if self._source == "data_dir" else []

    def load(self) -> None:
        for need in self.needs():
            need.check()
        if self._data_dir is not None:
            self._train_set, self._val_set = self._folders
            self._num_classes = len(self._train_set.classes)
        else:
            train, val = samples.generate(self._num_train, self._num_val)
            self._train_set, self._val_set = EmbeddedPictures(*train), EmbeddedPictures(*val)
            self._num_classes = len(samples.KINDS)

    def build_model(self) -> nn.Module:
        return narrow_resnet18(self._num_classes, self._width, self._stem).to(memory_format=self._layout)

    def train_loader(self, seed: int) -> EpochLoader:
        transform = train_transform(self._image_size, self._min_crop)
        pictures = Pictures(self._train_set, transform, seed)
        return train_batches(pictures, self._batch_size, seed, self._num_workers)

    def eval_loader(self) -> DataLoader:
        pictures = Pictures(self._val_set, eval_transform(self._image_size))
        return eval_batches(pictures, EVAL_BATCH_SIZE, self._num_workers)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        logits = model(normalise(batch["images"], self._layout))
        labels = batch["targets"]
        best = logits.topk(min(TOP, self._num_classes)).indices
        hits = best == labels[:, None]
        tally = torch.stack([torch.ones_like(labels).sum(), hits[:, 0].sum(), hits.sum()])
        return Output(F.cross_entropy(logits, labels), len(labels), tally)

    def metrics(self, tally: Tensor) -> dict[str, float]:
        pictures, top1, top5 = tally.tolist()
        metrics = {"accuracy": top1 / pictures}
        if self._num_classes > 2 * TOP:  # among ten, half would be right by chance
            metrics["top5_accuracy"] = top5 / pictures
        return metrics

    @functools.cached_property  # a million files take a while to list
    def _folders(self) -> tuple[ClassFolders, ClassFolders]:
        """Training and evaluation split of ``data_dir``."""
        classes = class_names(self._data_dir, self._classes_file)
        train, val = (ClassFolders(self._data_dir / split, classes) for split in SPLITS)
        return train, val


MISSING = (
    "ImageNet cannot be fetched: its licence asks each user to register at https://image-net.org. Then give "
    "data_dir=<folder that holds train/ and val/, in each a folder of pictures for each class>; "
    "task.classes=<file of class names> takes a part of it, such as ImageNet-100. preset=mini brings its own "
    "pictures"
)


# Data


class EmbeddedPictures(Dataset):
    """Generated pictures and their labels.

    Args:
        pictures: bytes, (number, height, width, 3).
        labels: class indices, (number,).
    """

    def __init__(self, pictures: np.ndarray, labels: np.ndarray) -> None:
        self._pictures = pictures
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pictures[index]), int(self._labels[index])


class ClassFolders(ImageFolder):
    """torchvision's ``ImageFolder`` of chosen classes in a given order.

    Args:
        root: folder of the class folders.
        classes: names of class folders; their numbers are their places here.
    """

    def __init__(self, root: Path, classes: Sequence[str]) -> None:
        self._chosen = list(classes)
        try:
            super().__init__(str(root), loader=open_rgb)
        except FileNotFoundError as error:
            raise UserError(f"{root.absolute()}: {error}") from error

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return self._chosen, {name: index for index, name in enumerate(self._chosen)}


def class_names(data_dir: Path, classes_file: Path | None) -> list[str]:
    """Names of the class folders to read; errors say which folder to give, or what is missing there."""
    expected = "train/ and val/, in each a folder of pictures for each class"
    there = {split: folders_in(split) for split in needs.published_files(data_dir, SPLITS, expected)}
    for split, folders in there.items():
        if not folders:
            raise UserError(
                f"{split.absolute()} must hold a folder of pictures for each class, and holds none; pictures "
                "that lie there loose must be sorted into folders first"
            )
    names = sorted(there[data_dir / "train"]) if classes_file is None else named_in(classes_file)
    for split, folders in there.items():
        missing = [name for name in names if name not in folders]
        if missing:
            raise UserError(
                f"{split.absolute()} lacks {len(missing)} of {len(names)} class folders, "
                f"{missing[0]!r} for one.{nearest(missing[0], folders)}"
            )
    return names


def folders_in(path: Path) -> set[str]:
    """Names of the folders in a folder; none where it is a file."""
    return {entry.name for entry in os.scandir(path) if entry.is_dir()} if path.is_dir() else set()


def named_in(file: Path) -> list[str]:
    """Names of classes, one in each line."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes: cannot read {file.absolute()}: {reason(error)}") from error
    # What follows a name is a description; a name given twice is one class.
    names = dict.fromkeys(line.split()[0] for line in lines if line.strip())
    if not names:
        raise UserError(f"classes: {file.absolute()} must name a class folder in each line, and is empty")
    return list(names)


def train_transform(size: int, min_crop: float) -> v2.Transform:
    """Random crop, mirrored or not."""
    return v2.Compose([v2.RandomResizedCrop(size, scale=(min_crop, 1.0)), v2.RandomHorizontalFlip()])


def eval_transform(size: int) -> v2.Transform:
    """Central crop."""
    return v2.Compose([v2.Resize(round(size * RESIZE)), v2.CenterCrop(size)])


# Model


def narrow_resnet18(num_classes: int, width: int, stem: str) -> ResNet:
    """torchvision's ResNet18, initialised the same way, with ``width`` channels in its first stage.

    Args:
        num_classes: of the logits.
        width: 64 in ResNet18; doubled from stage to stage.
        stem: ``standard`` is 7 x 7 with stride 2 and max pooling; ``small`` is 3 x 3 with stride 2 alone, for
            pictures that would be left with no pixels.
    """
    if (width, stem) == (FULL_WIDTH, "standard"):
        return resnet18(num_classes=num_classes)
    with torch.device("meta"):
        model = resnet18()
    model.inplanes = width
    if stem == "standard":
        model.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    else:
        model.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model.bn1 = nn.BatchNorm2d(width)
    for stage in range(4):
        blocks = model._make_layer(BasicBlock, width * 2**stage, blocks=2, stride=1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", blocks)
    model.fc = nn.Linear(model.inplanes, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
