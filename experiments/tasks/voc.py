"""What does each pixel show? A U-Net on PASCAL VOC 2012, or on drawn shapes of our own."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vf

from experiments.errors import UserError
from experiments.tasks import needs
from experiments.tasks.base import Batch, EpochLoader, Output, Task
from experiments.tasks.images import (
    MEAN,
    Pictures,
    UnreadableFile,
    check_at_least,
    check_choice,
    check_keys,
    eval_batches,
    layout,
    normalise,
    open_picture,
    open_rgb,
    train_batches,
)
from experiments.tasks.metrics import accuracy, confusion_matrix, iou, mean_iou
from experiments.tasks.needs import NOT_FETCHED, Need, fetch_whole, in_folder
from experiments.tasks.samples import voc as samples
from experiments.tasks.unet import UnetMaker

SOURCES = ("embedded", "download")
MODEL_KEYS = ("encoder_name", "encoder_weights", "encoder_depth", "decoder_channels")
SPLITS = ("train", "val")
YEAR = "2012"
URL = DATASET_YEAR_DICT[YEAR]["url"]
DEVKIT = Path("VOCdevkit", "VOC2012")
VOID = 255
CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
EVAL_BATCH_SIZE = 16
SCALES = (0.5, 2.0)
GREY = tuple(round(255 * value) for value in MEAN)  # 0 once normalised

Pair = tuple[Image.Image, tv_tensors.Mask]
"""A picture, and its mask, uint8 (height, width)."""


class VOC(Task):
    """Segmentation with a U-Net of segmentation-models-pytorch, scored by the mean IoU over all classes.

    It is computed from one confusion matrix of the whole set; void pixels (255) count neither there nor in
    the loss. Training pictures are enlarged or shrunk, cropped and mirrored at random. In evaluation a
    picture is shrunk to fit into ``image_size`` if it is larger, and never enlarged.

    Args:
        model: of ``segmentation_models_pytorch.Unet``: ``encoder_name``, ``encoder_weights`` (None for an
            encoder from scratch), ``encoder_depth``, ``decoder_channels``.
        data_dir: folder that holds ``VOCdevkit/VOC2012`` as published. Replaces ``source`` and changes
            nothing else.
        source: ``embedded`` for drawn shapes, ``download`` for VOC2012 by torchvision, which keeps it.
        image_size: side of what the model is given, in pixels.
        batch_size: pictures in a training batch.
        num_workers: processes that load pictures; 0 for none. Changes no number.
        channels_last: whether the channels of a pixel lie together in memory.
        num_train: embedded pictures to train on.
        num_val: embedded pictures to evaluate on.
    """

    metric = "miou"

    def __init__(
        self,
        *,
        model: Mapping[str, Any],
        data_dir: str | None = None,
        source: str = "embedded",
        image_size: int = 512,
        batch_size: int = 16,
        num_workers: int = 0,
        channels_last: bool = True,
        num_train: int = 2_000,
        num_val: int = 300,
    ) -> None:
        check_keys("model", model, MODEL_KEYS)
        check_choice("source", source, SOURCES)
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("num_train", num_train, 1)
        check_at_least("num_val", num_val, 1)
        check_at_least("image_size", image_size, 32)
        self._model = UnetMaker(**model)
        self._data_dir = None if data_dir is None else Path(str(data_dir)).expanduser()
        self._source = source
        self._image_size = image_size
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._layout = layout(channels_last)
        self._num_train, self._num_val = num_train, num_val

    def input_files(self) -> list[Path]:
        return [] if self._data_dir is None else published_files(self._data_dir)

    def needs(self) -> list[Need]:
        data = self._data()
        return [*([] if data is None else [data]), *self._model.needs()]

    def load(self) -> None:
        self._model.check(self._image_size)
        data = self._data()
        if data is None:
            train, val = samples.generate(self._num_train, self._num_val)
            self._train_set, self._val_set = EmbeddedPairs(*train), EmbeddedPairs(*val)
        else:
            data.get()
            self._train_set, self._val_set = (PublishedPairs(data.place, split) for split in SPLITS)
        self._classes = self._train_set.classes

    def build_model(self) -> nn.Module:
        return self._model.build(len(self._classes)).to(memory_format=self._layout)

    def train_loader(self, seed: int) -> EpochLoader:
        pictures = Pictures(self._train_set, train_transform(self._image_size), seed)
        return train_batches(pictures, self._batch_size, seed, self._num_workers)

    def eval_loader(self) -> DataLoader:
        pictures = Pictures(self._val_set, functools.partial(fit, size=self._image_size))
        return eval_batches(pictures, EVAL_BATCH_SIZE, self._num_workers)

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        logits = model(normalise(batch["images"], self._layout))
        masks = batch["targets"].long()
        loss = F.cross_entropy(logits, masks, ignore_index=VOID)
        tally = confusion_matrix(logits.argmax(1), masks, len(self._classes), VOID)
        return Output(loss, len(masks), tally)

    def metrics(self, tally: Tensor) -> dict[str, float]:
        of_class = dict(zip(self._classes, iou(tally), strict=True))
        return {
            "miou": mean_iou(tally),
            "pixel_accuracy": accuracy(tally),
            # A class that is neither shown nor predicted has none.
            **{f"iou/{name}": value for name, value in of_class.items() if not math.isnan(value)},
        }

    def _data(self) -> Need | None:
        if self._data_dir is not None:
            return in_folder("VOC2012", self._data_dir, published_files)
        return download() if self._source == "download" else None


# Data


class EmbeddedPairs(Dataset):
    """Drawn pictures and their masks.

    Args:
        pictures: bytes, (number, height, width, 3).
        masks: bytes, (number, height, width).
    """

    classes: ClassVar = samples.CLASSES

    def __init__(self, pictures: np.ndarray, masks: np.ndarray) -> None:
        self._pictures = pictures
        self._masks = masks

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> Pair:
        return Image.fromarray(self._pictures[index]), tv_tensors.Mask(self._masks[index])


class PublishedPairs(VOCSegmentation):
    """torchvision's ``VOCSegmentation`` with checked masks, and messages that name an odd file.

    Args:
        root: folder that holds ``VOCdevkit/VOC2012``.
        split: ``train`` or ``val``.
    """

    classes: ClassVar = CLASSES

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(str(root), YEAR, split)

    def __getitem__(self, index: int) -> Pair:
        where = self.masks[index]
        picture, mask = open_rgb(self.images[index]), np.array(open_picture(where))
        if mask.ndim != 2:
            raise UnreadableFile(f"the mask {where} must hold class numbers, as a palette picture does")
        if mask.shape != picture.size[::-1]:
            raise UnreadableFile(f"the mask {where} is {mask.shape[::-1]}, its picture {picture.size} pixels")
        unknown = mask[(mask >= len(CLASSES)) & (mask != VOID)]
        if len(unknown):
            raise UnreadableFile(
                f"the mask {where} must hold 0 to {len(CLASSES) - 1}, or {VOID} for void, got {unknown[0]}"
            )
        return picture, tv_tensors.Mask(mask)


def published_files(root: Path) -> list[Path]:
    """Lists, pictures and masks of both splits; an error says which folder to give, or what is missing."""
    lists = needs.published_files(
        root,
        [DEVKIT / "ImageSets" / "Segmentation" / f"{split}.txt" for split in SPLITS],
        f"{DEVKIT} with JPEGImages, SegmentationClass and ImageSets/Segmentation",
    )
    names = [name for file in lists for name in file.read_text().split()]
    files = [root / DEVKIT / "JPEGImages" / f"{name}.jpg" for name in names]
    files += [root / DEVKIT / "SegmentationClass" / f"{name}.png" for name in names]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(files)} files that {lists[0].parent} names are missing, "
            f"{missing[0]} for one"
        )
    return [*lists, *files]


def download() -> Need:
    """VOC2012 by torchvision, kept in ``downloads()``."""
    root = downloads()
    found = in_folder("VOC2012", root, published_files)
    return found._replace(
        problem=found.problem and NOT_FETCHED,
        source=URL,
        fetch=lambda: fetch_whole(_fetch, root, DEVKIT.parts[0]),
        give=f"data_dir=<folder that holds {DEVKIT}>",
    )


def _fetch(folder: Path) -> None:
    VOCSegmentation(folder, YEAR, download=True)


def downloads() -> Path:
    """Where VOC2012 is kept once it is downloaded: beside what torch itself fetches."""
    return Path(torch.hub.get_dir()).parent / "datasets" / "voc2012"


# Transforms of a picture together with its mask


def train_transform(size: int) -> v2.Transform:
    """Enlarged or shrunk, cropped or padded, mirrored or not."""
    padding = {Image.Image: GREY, tv_tensors.Mask: VOID}
    return v2.Compose(
        [
            v2.ScaleJitter((size, size), SCALES),
            v2.RandomCrop((size, size), pad_if_needed=True, fill=padding),
            v2.RandomHorizontalFlip(),
        ]
    )


def fit(picture: Image.Image, mask: tv_tensors.Mask, size: int) -> Pair:
    """Shrink to ``size`` what is larger; the rest of the square is void."""
    scale = size / max(picture.size)
    if scale < 1:
        shape = [max(1, round(scale * side)) for side in mask.shape]
        picture, mask = vf.resize(picture, shape), vf.resize(mask, shape)
    height, width = mask.shape
    padding = [0, 0, size - width, size - height]
    return vf.pad(picture, padding, fill=GREY), vf.pad(mask, padding, fill=VOID)
