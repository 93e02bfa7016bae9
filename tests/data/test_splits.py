"""Splits of a study, and their batches of pixels."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, write_shapes
from PIL import Image
from transformers import ViTImageProcessorPil

from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.processes import child_environment
from vitnb.study import load_study


@pytest.fixture
def shapes(tmp_path, mini_yaml):
    """A copy of the mini study with its own images, for damage."""
    write_shapes(tmp_path / "shapes", {"train": 3, "valid": 2, "test": 2})
    path = tmp_path / "own.yaml"
    lines = [
        f"data: {tmp_path}/shapes" if line.startswith("data:") else line
        for line in mini_yaml.read_text().splitlines()
    ]
    path.write_text("\n".join(lines))
    return load_study(str(path)), tmp_path / "shapes"


def test_classes_are_the_folders_in_sorted_order(shapes):
    study, root = shapes
    for name, count in (("train", 3), ("test", 2)):
        split = load_split(study, name)
        assert split.class_names == sorted(CLASSES) and len(split) == 4 * count
        assert [split.class_names[label] for label in split.labels] == [
            path.parent.name for path in split.paths
        ]
        assert all(path.is_relative_to(root / name) for path in split.paths)


def test_hidden_and_other_files_are_no_images(shapes):
    study, root = shapes
    (root / "train" / "ring" / ".DS_Store").write_text("x")
    (root / "train" / "ring" / "notes.txt").write_text("x")
    assert len(load_split(study, "train")) == 12


def test_an_empty_class_folder(shapes):
    study, root = shapes
    (root / "train" / "triangle").mkdir()
    with pytest.raises(UserError, match="triangle is empty"):
        load_split(study, "train")


def test_a_class_that_was_not_trained(shapes):
    study, root = shapes
    (root / "test" / "star").mkdir()
    with pytest.raises(UserError, match="star has no counterpart in train"):
        load_split(study, "test")


def test_missing_splits_and_too_few_classes(shapes, tmp_path):
    study, root = shapes
    (root / "valid").rename(root / "held out")
    with pytest.raises(
        UserError, match=r"no folder .*valid: a data set needs train, valid, test"
    ):
        load_split(study, "valid")
    for kind in CLASSES[1:]:
        (root / "train" / kind).rename(tmp_path / kind)
    with pytest.raises(UserError, match="1 class folders"):
        load_split(study, "train")


def test_an_unreadable_training_image_is_named(shapes):
    study, root = shapes
    bad = root / "train" / "ring" / "00.png"
    bad.write_bytes(bad.read_bytes()[:60])
    split = load_split(study, "train")
    with pytest.raises(
        UserError, match=r"cannot read .*ring/00.png .*replace it or delete it"
    ):
        dataset.PixelDataset(split, processor())[split.paths.index(bad)]


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": 24, "width": 20},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    )


def test_pixels_are_resized_scaled_and_normalized():
    image = Image.fromarray(
        np.random.RandomState(0).randint(0, 256, (50, 40, 3)).astype(np.uint8)
    )
    small = np.asarray(
        image.resize((20, 24), Image.Resampling.BILINEAR), dtype=np.float64
    )
    oracle = (small / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    found = dataset.to_pixels([image, image], processor())
    assert found.shape == (2, 3, 24, 20) and found.dtype == torch.float32
    np.testing.assert_allclose(found[1].permute(1, 2, 0).numpy(), oracle, atol=1e-5)


def test_augmentation_stays_within_its_bounds():
    image = Image.fromarray(
        np.random.RandomState(2).randint(0, 256, (60, 80, 3)).astype(np.uint8)
    )
    pixels, areas, mirrored = np.asarray(image), [], 0
    for i in range(200):
        crop = np.asarray(dataset.augment(image, np.random.default_rng(i), 0.5))
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
        np.array_equal(pixels[y : y + height, x : x + width], window)
        for y, x in zip(rows, columns, strict=True)
    )


def test_an_image_of_an_epoch_is_always_the_same(shapes):
    split = load_split(shapes[0], "train")
    one, two, other = (
        dataset.PixelDataset(split, processor(), seed, 0.5) for seed in (3, 3, 4)
    )
    assert torch.equal(one[5][0], two[5][0]) and not torch.equal(one[5][0], other[5][0])
    two.epoch = 1
    assert not torch.equal(one[5][0], two[5][0])
    plain = dataset.PixelDataset(split, processor())
    assert torch.equal(
        plain[5][0], dataset.to_pixels([read_image(split.paths[5])], processor())[0]
    )


def test_batches_hold_every_image_once_in_a_seeded_order(shapes):
    split = load_split(shapes[0], "train")
    orders = [
        [
            int(label)
            for _, labels in dataset.make_batches(
                dataset.PixelDataset(split, processor()), 5, seed
            )
            for label in labels
        ]
        for seed in (None, 1, 1, 2)
    ]
    assert orders[0] == split.labels and orders[1] == orders[2] != orders[3]
    assert all(sorted(order) == split.labels for order in orders)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, 3)])
def test_halves(shapes, order):
    """Twelve images in the order of their classes, and eight in another order."""
    split = load_split(shapes[0], "train")
    if order.step:
        mixed = [*range(12)[order], 1, 4, 7, 10]
        split = replace(
            split,
            paths=[split.paths[i] for i in mixed],
            labels=[split.labels[i] for i in mixed],
        )
    one, two = split.split_in_half()
    assert not set(one.paths) & set(two.paths) and set(one.paths) | set(
        two.paths
    ) == set(split.paths)
    assert (
        set(one.labels) == set(two.labels) == {0, 1, 2, 3}
        and len(one) == len(two) == len(split) // 2
    )
    for half in (one, two):
        assert [half.class_names[label] for label in half.labels] == [
            path.parent.name for path in half.paths
        ]
        assert (
            half.name == "train"
            and [path for path in split.paths if path in half.paths] == half.paths
        )
    if not order.step:
        assert one.paths == split.paths[::2] and two.paths == split.paths[1::2]
    bare = replace(split, labels=[]).split_in_half()
    assert [half.labels for half in bare] == [[], []] and bare[1].paths == split.paths[
        1::2
    ]
    with pytest.raises(
        UserError, match="1 images of the train split: two halves take at least 2"
    ):
        replace(split, paths=split.paths[:1], labels=[0]).split_in_half()


def test_the_first_batch_is_spread_over_the_split_and_never_too_small(shapes):
    split = load_split(shapes[0], "test")
    assert dataset.first_batch(split, processor(), 20).shape[0] == 20
    four = dataset.first_batch(split, processor(), 4)
    oracle = dataset.to_pixels(
        [read_image(split.paths[i]) for i in (0, 2, 4, 6)], processor()
    )
    assert torch.equal(four, oracle)


def test_lists_of_images_load_no_torch():
    """The report reads duplicates, and PyTorch takes seconds to load."""
    program = (
        "import sys, vitnb.data.duplicates, vitnb.data.splits, vitnb.data.garden\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}"
        " & {'torch', 'transformers', 'bitsandbytes', 'scipy', 'pandas'}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"
