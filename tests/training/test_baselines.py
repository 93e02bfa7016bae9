"""Baselines: three simple classifiers on the same pixels."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.preprocessing import StandardScaler
from torch.utils.data import TensorDataset

from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import load_split
from vitnb.models import checkpoints, pretrained
from vitnb.training import baselines


def test_each_image_is_read_once_for_all_floors(mini, monkeypatch):
    train, test = load_split(mini, "train"), load_split(mini, "test")
    processor = checkpoints.load_processor(pretrained.find_base(mini))
    read, seen = read_image, []
    monkeypatch.setattr(
        dataset, "read_image", lambda path: (seen.append(path), read(path))[1]
    )
    found = baselines.measure_baselines(mini, train, test, processor)
    once = sorted(
        [*train.paths, *test.paths, train.paths[0], test.paths[0]]
    )  # the first of each also for its size
    assert sorted(seen) == once and found["images"] == [32, 24]
    monkeypatch.undo()
    # The oracle: scikit-learn on pixels that are read here, one by one.
    rows = [
        np.stack(
            [
                dataset.to_pixels([read_image(path)], processor)[0].numpy().ravel()
                for path in split.paths
            ]
        )
        for split in (train, test)
    ]
    oracle = (
        RidgeClassifier(alpha=1e3)
        .fit(rows[0], train.labels)
        .score(rows[1], test.labels)
    )
    assert found["pixels"] == pytest.approx(oracle)
    assert all(0 <= found[name] <= 1 for name in ("untrained", "probe"))


def test_a_probe_sees_what_the_head_sees(mini):
    """The oracle is the class token after the last layer norm."""
    train = load_split(mini, "train")
    seen = dataset.load_into_memory(
        train, checkpoints.load_processor(pretrained.find_base(mini))
    )
    model = pretrained.load_base(mini, train.class_names).eval()
    found = baselines._features(model, seen)
    with torch.inference_mode():
        oracle = (
            model.vit(seen.tensors[0].to(model.device))
            .last_hidden_state[:, 0]
            .float()
            .cpu()
        )
    assert found.shape == (32, 64)
    # Features are computed in 16 bits where the machine has units for them.
    np.testing.assert_allclose(found, oracle, atol=0.05)


def mislabelled(random, labels, wrong):
    """One label in five is wrong. A probe that follows all labels overfits."""
    centres = 0.3 * np.random.default_rng(0).normal(size=(2, 100))
    seen = centres[labels] + random.normal(size=(len(labels), 100))
    return seen, np.where(random.random(len(labels)) < 0.2 * wrong, 1 - labels, labels)


def fine_print(random, labels, _):
    """Two numbers are almost equal, and their difference is the class.

    A probe needs large weights for that.
    """
    shared, difference = 10 * random.normal(size=(2, len(labels), 1))
    difference = 0.01 * difference + labels[:, None]
    return np.hstack([shared + difference, shared - difference]), labels


@pytest.mark.parametrize(("seen", "unfit"), [(mislabelled, 1.0), (fine_print, 0.01)])
def test_a_probe_is_held_back_as_its_own_images_ask_for(monkeypatch, seen, unfit):
    random = np.random.default_rng(1)
    (rows, labels), (others, wanted) = (
        seen(random, np.arange(240) % 2, True),
        seen(random, np.arange(999) % 2, False),
    )
    train, test = (
        TensorDataset(*map(torch.from_numpy, part))
        for part in ((rows, labels), (others, wanted))
    )
    monkeypatch.setattr(
        baselines, "_features", lambda model, part: part.tensors[0].numpy()
    )
    scale = StandardScaler().fit(rows)
    oracle = (
        LogisticRegression(C=unfit)
        .fit(scale.transform(rows), labels)
        .score(scale.transform(others), wanted)
    )
    assert baselines._probe(None, train, test) > oracle + 0.1


def test_one_image_of_a_class_is_a_floor_all_the_same(monkeypatch):
    images = TensorDataset(torch.eye(3), torch.arange(3))
    monkeypatch.setattr(
        baselines, "_features", lambda model, part: part.tensors[0].numpy()
    )
    assert baselines._probe(None, images, images) == 1.0
