"""Caching: large splits are subsampled, and cached images stay the same."""

import pytest
import torch
from torch.utils.data import Subset

from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import load_split
from vitnb.models import checkpoints, pretrained

ONE = 3 * 32 * 32 * 4  # bytes of an image's pixels


@pytest.fixture
def read(monkeypatch) -> list:
    """The paths of the pictures that are read from now on."""
    really, seen = read_image, []
    monkeypatch.setattr(
        dataset, "read_image", lambda path: (seen.append(path), really(path))[1]
    )
    return seen


def test_a_large_data_set_is_subsampled_evenly(mini, monkeypatch):
    """Eight training images of each of four classes; memory for nine images."""
    train = load_split(mini, "train")
    processor = checkpoints.load_processor(pretrained.find_base(mini))
    monkeypatch.setattr(dataset, "CACHE_BYTES", 9 * ONE + 100)
    found = dataset.load_into_memory(train, processor)
    assert len(found) == 9 and torch.bincount(found.tensors[1]).min() >= 2
    assert torch.equal(
        found.tensors[0][0], dataset.PixelDataset(train, processor)[0][0]
    )


@pytest.mark.parametrize("room", [100, 7, 0])
def test_every_image_of_every_reading_is_there_and_few_are_read_again(
    shapes, monkeypatch, read, room
):
    """Read 20 images three times, in batches of six; 20, 7 or none fit."""
    _, valid, processor = shapes
    monkeypatch.setattr(dataset, "CACHE_BYTES", room * ONE + 100)
    oracle = [
        dataset.to_pixels([read_image(path)], processor)[0] for path in valid.paths
    ]
    read.clear()
    found = dataset.CachedDataset(dataset.PixelDataset(valid, processor))
    for _ in range(3):
        pixels, labels = (
            torch.cat(parts)
            for parts in zip(*dataset.make_batches(found, 6), strict=True)
        )
        assert (
            torch.equal(pixels, torch.stack(oracle)) and labels.tolist() == valid.labels
        )
    assert len(read) == 20 + 2 * (20 - min(20, room)) and set(read) == set(valid.paths)
    assert torch.equal(found[19][0], oracle[19]) and len(found) == 20


def test_of_a_shared_split_a_process_reads_its_part_only(shapes, read):
    _, valid, processor = shapes
    found = dataset.CachedDataset(dataset.PixelDataset(valid, processor))
    for _ in range(2):
        labels = torch.cat(
            [
                labels
                for _, labels in dataset.make_batches(Subset(found, range(1, 20, 3)), 4)
            ]
        )
        assert labels.tolist() == valid.labels[1::3]
    assert read == valid.paths[1::3]
