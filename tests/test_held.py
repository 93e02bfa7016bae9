"""Held images: what is thinned to fit, and what is read once and still whole."""

import pytest
import torch
from torch.utils.data import Subset

from vitnb import bases, checkpoints, data, held

ONE = 3 * 32 * 32 * 4  # bytes of an image's pixels


@pytest.fixture
def read(monkeypatch) -> list:
    """The paths of the pictures that are read from now on."""
    really, seen = data.read, []
    monkeypatch.setattr(data, "read", lambda path: (seen.append(path), really(path))[1])
    return seen


def test_of_a_large_data_set_images_spread_over_it_are_held(mini, monkeypatch):
    """Eight training images of each of four classes; memory for nine images."""
    train = data.split(mini, "train")
    processor = checkpoints.processor(bases.find(mini))
    monkeypatch.setattr(held, "HELD", 9 * ONE + 100)
    found = held.spread(train, processor)
    assert len(found) == 9 and torch.bincount(found.tensors[1]).min() >= 2
    assert torch.equal(found.tensors[0][0], data.Pixels(train, processor)[0][0])


@pytest.mark.parametrize("room", [100, 7, 0])
def test_every_image_of_every_reading_is_there_and_few_are_read_again(shapes, monkeypatch, read, room):
    """Twenty images, memory for all, for seven or for none of them; three readings in batches of six."""
    _, valid, processor = shapes
    monkeypatch.setattr(held, "HELD", room * ONE + 100)
    oracle = [data.to_pixels([data.read(path)], processor)[0] for path in valid.paths]
    read.clear()
    found = held.Held(data.Pixels(valid, processor))
    for _ in range(3):
        pixels, labels = (torch.cat(parts) for parts in zip(*data.batches(found, 6), strict=True))
        assert torch.equal(pixels, torch.stack(oracle)) and labels.tolist() == valid.labels
    assert len(read) == 20 + 2 * (20 - min(20, room)) and set(read) == set(valid.paths)
    assert torch.equal(found[19][0], oracle[19]) and len(found) == 20


def test_of_a_shared_split_a_process_reads_its_part_only(shapes, read):
    _, valid, processor = shapes
    found = held.Held(data.Pixels(valid, processor))
    for _ in range(2):
        labels = torch.cat([labels for _, labels in data.batches(Subset(found, range(1, 20, 3)), 4)])
        assert labels.tolist() == valid.labels[1::3]
    assert read == valid.paths[1::3]
