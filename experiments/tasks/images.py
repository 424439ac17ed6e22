"""What tasks on pictures share: decoding, augmentation by (seed, epoch, index), batches, normalisation."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from experiments.errors import UserError, nearest
from experiments.tasks.base import Batch, EpochLoader, as_is
from experiments.tasks.needs import reason

# Of ImageNet, in [0, 1] for red, green and blue: what pretrained encoders were trained with.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class UnreadableFile(UserError):
    """A file of a data set that cannot be used; the message names it."""


def open_picture(path: str | Path) -> Image.Image:
    """Decode a picture file as it is."""
    try:
        # Damaged side information (Exif, palette transparency) is no concern of the pixels.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            picture.load()
            return picture
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types
        raise UnreadableFile(f"cannot read the picture {path}: {reason(error)}") from error


def open_rgb(path: str | Path) -> Image.Image:
    """Decode a picture file to 8 bits of red, green and blue, whatever it holds; Exif turns are not applied.

    They are not in the published recipes either.
    """
    picture = open_picture(path)
    if picture.mode.startswith("I"):
        # 16 bits of grey, in two bytes or in four: Pillow would cut them off at 255.
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """In here torch's global generator draws what ``key`` alone decides; afterwards it goes on as before."""
    before = torch.get_rng_state()
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Source(Protocol):
    """A data set: pictures as they are stored, each with its target, a class index or a mask."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]: ...


class Pictures(Dataset):
    """Batches of a source's pictures, all made one size by ``transform``.

    What the transform draws depends on (seed, epoch, index) alone: neither on the process that loads a
    picture nor on what was drawn before, so that a resumed run sees the same with any number of workers.

    Args:
        source: of pictures and targets.
        transform: of torchvision's, applied to both.
        seed: of the run.
    """

    def __init__(self, source: Source, transform: Callable[..., Any], seed: int = 0) -> None:
        self._source = source
        self._transform = transform
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is drawn from now on, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: list[int]) -> Batch:
        """``images``, uint8 (batch, 3, height, width) with channels last in memory, and ``targets``."""
        images, targets = zip(*map(self._draw, indices), strict=True)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return {
            "images": pixels.permute(0, 3, 1, 2),
            "targets": torch.stack([torch.as_tensor(target) for target in targets]),
        }

    def _draw(self, index: int) -> tuple[Image.Image, Any]:
        picture = self._source[index]
        with drawn_from(self._seed, self._epoch, index):
            return self._transform(*picture)


def train_batches(pictures: Pictures, batch_size: int, seed: int, num_workers: int) -> EpochLoader:
    """Shuffled batches, epoch by epoch."""
    return EpochLoader(pictures, batch_size, seed, **_options(num_workers))


def eval_batches(pictures: Pictures, batch_size: int, num_workers: int) -> DataLoader:
    """All pictures once, in order."""
    sampler = BatchSampler(SequentialSampler(pictures), batch_size, drop_last=False)
    return DataLoader(pictures, batch_sampler=sampler, **_options(num_workers))


def _options(num_workers: int) -> dict[str, Any]:
    return {
        "collate_fn": as_is,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        # Workers are seeded from a generator of their own: the global one stays where the model left it.
        "generator": torch.Generator(),
    }


def normalise(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Bytes to floats of about zero mean and unit deviation, on the device that they lie on.

    Args:
        images: uint8, (batch, 3, height, width).
        layout: of the result in memory.
    """
    mean, deviation = _statistics(images.device)
    return images.float().contiguous(memory_format=layout).sub_(mean).div_(deviation)


@functools.cache  # the host would wait for a copy to the device in every step
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, deviation = (255 * torch.tensor(values, device=device) for values in (MEAN, DEVIATION))
    return mean[:, None, None], deviation[:, None, None]


def layout(channels_last: bool) -> torch.memory_format:
    """How pictures lie in memory, and the weights of a model for them."""
    if not isinstance(channels_last, bool):
        raise UserError(f"channels_last must be true or false, got {channels_last!r}")
    return torch.channels_last if channels_last else torch.contiguous_format


def check_at_least(name: str, value: Any, least: int) -> None:
    """Refuse a setting that is no whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a setting that is none of ``choices``."""
    if value not in choices:
        raise UserError(
            f"{name} must be {' or '.join(choices)}, got {value!r}.{nearest(str(value), choices)}"
        )


def check_keys(name: str, value: Any, keys: Sequence[str]) -> None:
    """Refuse a node that is no mapping, or has a key that is none of ``keys``."""
    if not isinstance(value, Mapping):
        raise UserError(f"{name} takes {', '.join(keys)}, got {value!r}")
    for key in value:
        if key not in keys:
            raise UserError(f"{name} takes {', '.join(keys)}, got {key!r}.{nearest(key, keys)}")
