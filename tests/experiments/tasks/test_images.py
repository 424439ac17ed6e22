"""What tasks on pictures share: decoding whatever a file holds, and batches that any worker repeats."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torchvision.transforms import v2

from experiments.tasks.images import (
    Pictures,
    UnreadableFile,
    drawn_from,
    eval_batches,
    layout,
    normalise,
    open_rgb,
    train_batches,
)

SIDE = 12
TRANSFORM = v2.Compose([v2.RandomResizedCrop(SIDE), v2.RandomHorizontalFlip()])


class Noise:
    """Twenty noisy pictures, each with its number; the ones in ``missing`` cannot be read."""

    def __init__(self, *missing: int) -> None:
        self._pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 20, 3), dtype=np.uint8)
        self._missing = missing

    def __len__(self):
        return len(self._pixels)

    def __getitem__(self, index):
        if index in self._missing:
            raise UnreadableFile(f"cannot read number {index}: no such thing")
        return Image.fromarray(self._pixels[index]), index


def epoch_of(pictures: Pictures, seed: int, epoch: int, num_workers: int = 0) -> list:
    loader = train_batches(pictures, 8, seed, num_workers)
    loader.set_epoch(epoch)
    return list(loader)


# Decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_whatever_a_file_holds_becomes_rgb(tmp_path, mode):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert("RGB")
        picture = picture.quantize(64) if mode == "P" else picture.convert(mode)
    path = tmp_path / f"picture.{'tiff' if mode == 'CMYK' else 'png'}"
    picture.save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    decoded = open_rgb(path)
    assert decoded.mode == "RGB"
    near = 255 if mode == "1" else 2
    assert abs(np.asarray(decoded).astype(int) - grey[:, :, None]).max() <= near
    assert np.ptp(np.asarray(decoded)) == 255


def test_sixteen_bits_are_scaled_in_any_container(tmp_path):
    depth = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(depth.astype(np.int32)).save(tmp_path / "deep.tiff")
    assert np.asarray(open_rgb(tmp_path / "deep.tiff"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_transparency_and_turns_raise_no_warning(tmp_path):
    picture = Image.fromarray(np.zeros((4, 8, 3), np.uint8)).quantize(4)
    picture.save(tmp_path / "see_through.png", transparency=bytes([0, 128, 255]))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_rgb(tmp_path / "see_through.png").size == (8, 4)
        assert open_rgb(tmp_path / "turned.jpg").size == (8, 4)


@pytest.mark.parametrize("content", [b"", b"no picture at all", None], ids=["empty", "text", "cut off"])
def test_an_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "picture.jpg"
    if content is None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:500]
    path.write_bytes(content)
    with pytest.raises(UnreadableFile) as caught:
        open_rgb(path)
    assert str(caught.value).startswith(f"cannot read the picture {path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableFile, match="No such file"):
        open_rgb(tmp_path / "missing.jpg")


def test_a_worker_hands_the_message_on_as_it_is():
    try:
        Noise(3)[3]
    except UnreadableFile:
        # What a worker process sends; the process itself would take five seconds to end.
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UnreadableFile) as caught:
        sent.reraise()
    assert str(caught.value) == "cannot read number 3: no such thing"


# Augmentation


def test_draws_come_from_the_key_alone_and_leave_the_global_generator_alone():
    def draw(*key):
        with drawn_from(*key):
            return torch.rand(3).tolist()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    drawn = [draw(*key) for key in keys]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert [draw(*key) for key in keys] == drawn
    assert len(set(map(tuple, drawn))) == len(keys)


def test_an_error_gives_the_global_generator_back_too():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), drawn_from(1):
        torch.rand(-1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_resumed_epoch_repeats_with_any_number_of_workers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    whole = epoch_of(Pictures(Noise(), TRANSFORM, seed=5), 5, epoch=2)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    loader = train_batches(Pictures(Noise(), TRANSFORM, seed=5), 8, 5, num_workers=2)
    loader.set_epoch(2)
    loader.skip(1)
    (resumed,) = loader
    for name, value in whole[1].items():
        assert torch.equal(value, resumed[name])
    other = epoch_of(Pictures(Noise(), TRANSFORM, seed=5), 5, epoch=3)
    assert not torch.equal(whole[1]["images"], other[1]["images"])


def test_a_picture_is_augmented_anew_in_each_epoch_and_for_each_seed():
    def drawn(seed, epoch):
        pictures = Pictures(Noise(), TRANSFORM, seed)
        pictures.set_epoch(epoch)
        together, alone = pictures.__getitems__([4, 7]), pictures.__getitems__([7])
        assert torch.equal(together["images"][1:], alone["images"])
        return alone["images"]

    seen = [drawn(0, 0), drawn(0, 1), drawn(1, 0), drawn(1, 1)]
    assert torch.equal(seen[0], drawn(0, 0))
    assert len({tensor.numpy().tobytes() for tensor in seen}) == 4


def test_evaluation_gives_all_pictures_once_in_order():
    batches = list(eval_batches(Pictures(Noise(), v2.CenterCrop(SIDE)), 8, 0))
    assert [len(batch["images"]) for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([batch["targets"] for batch in batches]), torch.arange(20))


# Batches on the device


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalising_follows_the_formula_in_either_layout(channels_last):
    (batch, *_) = eval_batches(Pictures(Noise(), v2.CenterCrop(SIDE)), 8, 0)
    images = batch["images"]
    assert images.dtype == torch.uint8
    before = images.clone()
    normalised = normalise(images, layout(channels_last))
    assert torch.equal(images, before)
    assert normalised.is_contiguous(memory_format=layout(channels_last))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.permute(0, 2, 3, 1).double().numpy() / 255 - mean) / deviation
    np.testing.assert_allclose(normalised.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_pictures_are_not_mixed_up_with_their_colours():
    source = Noise()
    (batch,) = eval_batches(Pictures(source, v2.Identity()), 20, 0)
    picture, _ = source[3]
    assert np.array_equal(batch["images"][3].permute(1, 2, 0).numpy(), np.asarray(picture))
