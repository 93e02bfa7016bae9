"""Floors: three classifiers on one reading of the images."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from vitnb import bases, checkpoints, data, floors, held


def test_each_image_is_read_once_for_all_floors(mini, monkeypatch):
    train, test = data.split(mini, "train"), data.split(mini, "test")
    processor = checkpoints.processor(bases.find(mini))
    read, seen = data.read, []
    monkeypatch.setattr(data, "read", lambda path: (seen.append(path), read(path))[1])
    found = floors.measure(mini, train, test, processor)
    once = sorted([*train.paths, *test.paths, train.paths[0], test.paths[0]])  # the first of each also for its size
    assert sorted(seen) == once and found["images"] == [32, 24]
    monkeypatch.undo()
    # The oracle: scikit-learn on pixels that are read here, one by one.
    rows = [
        np.stack([data.to_pixels([data.read(path)], processor)[0].numpy().ravel() for path in split.paths])
        for split in (train, test)
    ]
    oracle = RidgeClassifier(alpha=1e3).fit(rows[0], train.labels).score(rows[1], test.labels)
    assert found["pixels"] == pytest.approx(oracle)
    assert all(0 <= found[name] <= 1 for name in ("untrained", "probe"))


def test_a_probe_sees_what_the_head_sees(mini):
    """Features are those of the class token after the last layer norm, image by image."""
    train = data.split(mini, "train")
    seen = held.spread(train, checkpoints.processor(bases.find(mini)))
    model = bases.load(mini, train.class_names).eval()
    found = floors._features(model, seen)
    with torch.inference_mode():
        oracle = model.vit(seen.tensors[0].to(model.device)).last_hidden_state[:, 0].float().cpu()
    assert found.shape == (32, 64)
    np.testing.assert_allclose(found, oracle, atol=0.05)  # computed in 16 bits where the machine has units for it
