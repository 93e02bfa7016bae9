"""Images: folders to splits, and every kind of file read in one stated way."""

import numpy as np
import pytest
import torch
from conftest import CLASSES, write_shapes
from PIL import Image, features
from transformers import ViTImageProcessorPil

from vitnb import data, studies
from vitnb.errors import UserError


@pytest.fixture
def shapes(tmp_path, mini_yaml):
    """A copy of the mini study with its own images, for damage."""
    write_shapes(tmp_path / "shapes", {"train": 3, "valid": 2, "test": 2})
    path = tmp_path / "own.yaml"
    lines = [
        f"data: {tmp_path}/shapes" if line.startswith("data:") else line for line in mini_yaml.read_text().splitlines()
    ]
    path.write_text("\n".join(lines))
    return studies.load(str(path)), tmp_path / "shapes"


def test_classes_are_the_folders_in_sorted_order(shapes):
    study, root = shapes
    for name, count in (("train", 3), ("test", 2)):
        split = data.split(study, name)
        assert split.class_names == sorted(CLASSES) and len(split) == 4 * count
        assert [split.class_names[label] for label in split.labels] == [path.parent.name for path in split.paths]
        assert all(path.is_relative_to(root / name) for path in split.paths)


def test_hidden_and_other_files_are_no_images(shapes):
    study, root = shapes
    (root / "train" / "ring" / ".DS_Store").write_text("x")
    (root / "train" / "ring" / "notes.txt").write_text("x")
    assert len(data.split(study, "train")) == 12


def test_an_empty_class_folder(shapes):
    study, root = shapes
    (root / "train" / "triangle").mkdir()
    with pytest.raises(UserError, match="triangle is empty"):
        data.split(study, "train")


def test_a_class_that_was_not_trained(shapes):
    study, root = shapes
    (root / "test" / "star").mkdir()
    with pytest.raises(UserError, match="star has no counterpart in train"):
        data.split(study, "test")


def test_missing_splits_and_too_few_classes(shapes, tmp_path):
    study, root = shapes
    (root / "valid").rename(root / "validation")
    with pytest.raises(UserError, match=r"no folder .*valid: a data set needs train, valid, test"):
        data.split(study, "valid")
    for kind in CLASSES[1:]:
        (root / "train" / kind).rename(tmp_path / kind)
    with pytest.raises(UserError, match="1 class folders"):
        data.split(study, "train")


def test_an_unreadable_training_image_is_named(shapes):
    study, root = shapes
    bad = root / "train" / "ring" / "00.png"
    bad.write_bytes(bad.read_bytes()[:60])
    split = data.split(study, "train")
    with pytest.raises(UserError, match=r"cannot read .*ring/00.png .*replace it or delete it"):
        data.Pixels(split, processor())[split.paths.index(bad)]


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 24, "width": 20}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


def test_pixels_are_resized_scaled_and_normalized():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 40, 3)).astype(np.uint8))
    small = np.asarray(image.resize((20, 24), Image.Resampling.BILINEAR), dtype=np.float64)
    oracle = (small / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    found = data.to_pixels([image, image], processor())
    assert found.shape == (2, 3, 24, 20) and found.dtype == torch.float32
    np.testing.assert_allclose(found[1].permute(1, 2, 0).numpy(), oracle, atol=1e-5)


@pytest.fixture
def ramp() -> np.ndarray:
    """A picture in which every corner differs: uint8 [6, 8, 3]."""
    return np.random.RandomState(1).randint(0, 256, (6, 8, 3)).astype(np.uint8)


def test_exif_rotation_is_applied(tmp_path, ramp):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it a quarter clockwise
    Image.fromarray(ramp).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(data.read(tmp_path / "turned.png")), np.rot90(ramp, -1))


def test_sixteen_bit_grey_is_scaled_not_cut(tmp_path):
    values = np.array([[0, 257, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = np.asarray(data.read(tmp_path / "deep.png"))
    assert found.shape == (1, 4, 3) and np.array_equal(found[0, :, 1], [0, 1, 116, 255])


def test_transparency_lies_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    found = np.asarray(data.read(tmp_path / "clear.png")).astype(int)
    assert np.abs(found - [[[255, 0, 0], [255, 255, 255], [127, 127, 127]]]).max() <= 1


def test_a_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "palette.png", transparency=0)
    assert np.array_equal(np.asarray(data.read(tmp_path / "palette.png")), [[[255, 255, 255], [200, 100, 50]]])


def test_cmyk_grey_and_the_first_frame_of_an_animation(tmp_path, ramp):
    Image.fromarray(ramp).convert("CMYK").save(tmp_path / "print.tif")
    assert np.array_equal(np.asarray(data.read(tmp_path / "print.tif")), ramp)
    Image.fromarray(ramp[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(data.read(tmp_path / "grey.png")), ramp[..., :1].repeat(3, 2))
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert data.read(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_what_is_no_whole_picture_is_refused(tmp_path, ramp, monkeypatch):
    Image.fromarray(ramp.repeat(40, 0).repeat(40, 1)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.png", "missing.png"):
        with pytest.raises(data.UNREADABLE):
            data.read(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(data.UNREADABLE):
        data.read(tmp_path / "whole.jpg")


def test_damaged_files_that_pillow_stumbles_over_are_refused_too(tmp_path, ramp):
    """An AVIF without its pixels is a RuntimeError of Pillow's, and EXIF of a wrong type a TypeError or struct.error."""
    image, exif = Image.fromarray(ramp), Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.5  # a resolution: the numbers that are damaged below
    image.save(tmp_path / "whole.jpg", exif=exif)
    whole = (tmp_path / "whole.jpg").read_bytes()
    entry = whole.index(b"\x01\x1a\x00\x05" if b"MM\x00*" in whole else b"\x1a\x01\x05\x00")
    kind = entry + 2 + (b"MM\x00*" in whole)
    (tmp_path / "exif.jpg").write_bytes(whole[:kind] + b"\x02" + whole[kind + 1 :])  # a text, they now say
    data.read(tmp_path / "whole.jpg")
    with pytest.raises(data.UNREADABLE):
        data.read(tmp_path / "exif.jpg")
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    image.save(tmp_path / "whole.avif")
    data.read(tmp_path / "whole.avif")
    whole = (tmp_path / "whole.avif").read_bytes()
    payload = whole.index(b"mdat") + 4
    (tmp_path / "zeros.avif").write_bytes(whole[:payload] + bytes(len(whole) - payload))
    with pytest.raises(data.UNREADABLE):
        data.read(tmp_path / "zeros.avif")


def test_augmentation_stays_within_its_bounds():
    image = Image.fromarray(np.random.RandomState(2).randint(0, 256, (60, 80, 3)).astype(np.uint8))
    pixels, areas, mirrored = np.asarray(image), [], 0
    for i in range(200):
        crop = np.asarray(data.augment(image, np.random.default_rng(i), 0.5))
        areas.append(crop.shape[0] * crop.shape[1] / 4800)
        windows = [(crop, False), (crop[:, ::-1], True)]
        found = [flip for window, flip in windows if _lies_in(window, pixels)]
        assert len(found) == 1, "a crop is a piece of the picture, mirrored or not"
        mirrored += found[0]
    assert min(areas) > 0.42 and max(areas) <= 1.0 and np.std(areas) > 0.1
    assert 70 < mirrored < 130


def _lies_in(window: np.ndarray, pixels: np.ndarray) -> bool:
    rows, columns = np.nonzero((pixels == window[0, 0]).all(-1))
    height, width = window.shape[:2]
    return any(
        np.array_equal(pixels[y : y + height, x : x + width], window) for y, x in zip(rows, columns, strict=True)
    )


def test_an_image_of_an_epoch_is_always_the_same(shapes):
    split = data.split(shapes[0], "train")
    one, two, other = (data.Pixels(split, processor(), seed, 0.5) for seed in (3, 3, 4))
    assert torch.equal(one[5][0], two[5][0]) and not torch.equal(one[5][0], other[5][0])
    two.epoch = 1
    assert not torch.equal(one[5][0], two[5][0])
    plain = data.Pixels(split, processor())
    assert torch.equal(plain[5][0], data.to_pixels([data.read(split.paths[5])], processor())[0])


def test_batches_hold_every_image_once_in_a_seeded_order(shapes):
    split = data.split(shapes[0], "train")
    orders = [
        [int(label) for _, labels in data.batches(data.Pixels(split, processor()), 5, seed) for label in labels]
        for seed in (None, 1, 1, 2)
    ]
    assert orders[0] == split.labels and orders[1] == orders[2] != orders[3]
    assert all(sorted(order) == split.labels for order in orders)


def test_the_first_batch_is_spread_over_the_split_and_never_too_small(shapes):
    split = data.split(shapes[0], "test")
    assert data.first_batch(split, processor(), 20).shape[0] == 20
    four = data.first_batch(split, processor(), 4)
    oracle = data.to_pixels([data.read(split.paths[i]) for i in (0, 2, 4, 6)], processor())
    assert torch.equal(four, oracle)
