"""Measure baselines: simple classifiers on the same images as the fine-tuned model.

An easy data set makes any model look good. A baseline shows how much of the top-1 comes
from the data.
"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import TensorDataset
from transformers import AutoModelForImageClassification

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.models import checkpoints, layers, pretrained
from vitnb.study import Study

# Inverse strengths of regularization, C of a logistic regression.
INVERSE_STRENGTHS = (0.01, 0.1, 1.0)


def measure_baselines(
    study: Study, train_split: Split, test_split: Split, processor
) -> dict[str, float | list[int]]:
    """Return the test top-1 of all three baselines.

    Images are read once. If a split does not fit into memory, a part of it is used, see
    ``dataset.load_into_memory``.

    Returns:
        pixels: of ``pixel_baseline``; untrained: of ``random_init_baseline``; probe: of
        ``linear_probe``; images: how many were used, [training, test].
    """
    train_images = dataset.load_into_memory(train_split, processor)
    test_images = dataset.load_into_memory(test_split, processor)
    class_names = train_split.class_names
    return {
        "pixels": pixel_baseline(train_images, test_images),
        "untrained": random_init_baseline(
            study, len(class_names), train_images, test_images
        ),
        "probe": linear_probe(study, class_names, train_images, test_images),
        "images": [len(train_images), len(test_images)],
    }


def pixel_baseline(train_images: TensorDataset, test_images: TensorDataset) -> float:
    """Return the test top-1 of a linear classifier on the pixels.

    The classifier is a ridge regression on one-hot labels (scikit-learn).
    """
    classifier = RidgeClassifier(alpha=1e3)
    classifier.fit(_pixels(train_images), _labels(train_images))
    return float(classifier.score(_pixels(test_images), _labels(test_images)))


def random_init_baseline(
    study: Study, classes: int, train_images: TensorDataset, test_images: TensorDataset
) -> float:
    """Return the test top-1 of a linear probe on the base with random weights."""
    config = checkpoints.read_config(pretrained.find_base(study), num_labels=classes)
    # A GPU draws the weights of a large model much faster than a CPU.
    with devices.select_device():
        # The config may say 16 bits.
        model = AutoModelForImageClassification.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    return _probe(model.eval(), train_images, test_images)


def linear_probe(
    study: Study,
    class_names: list[str],
    train_images: TensorDataset,
    test_images: TensorDataset,
) -> float:
    """Return the test top-1 of a linear probe on the frozen base.

    Fine-tuning should reach at least this.
    """
    model = pretrained.load_base(study, class_names).eval()
    return _probe(model, train_images, test_images)


def _probe(
    model: nn.Module, train_images: TensorDataset, test_images: TensorDataset
) -> float:
    """Return the test top-1 of a logistic regression on the features of a model.

    Twofold cross-validation on the training images chooses the regularization. A probe
    that overfits would be too weak a baseline.
    """
    # A tenth of this tolerance took three times as long and moved top-1 by 0.2 points
    # at most.
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3)
    )
    labels = _labels(train_images)
    images_per_class = np.unique(labels, return_counts=True)[1]
    if images_per_class.min() > 1:
        choices = {"logisticregression__C": INVERSE_STRENGTHS}
        classifier = GridSearchCV(classifier, choices, cv=2)
    classifier.fit(_features(model, train_images), labels)
    return float(classifier.score(_features(model, test_images), _labels(test_images)))


@torch.no_grad()
def _features(model: nn.Module, images: TensorDataset) -> np.ndarray:
    """Return the inputs of the classification head, float32 [images, hidden]."""
    device = devices.select_device()
    with layers.collect_features(model) as features, devices.autocast(device):
        for pixels, _ in dataset.make_batches(images, dataset.BATCH_SIZE):
            model(pixel_values=pixels.to(device))
    return torch.cat(features).numpy()


def _pixels(images: TensorDataset) -> np.ndarray:
    """Return the pixels of each image in a row, float32 [images, numbers]."""
    return images.tensors[0].flatten(1).numpy()


def _labels(images: TensorDataset) -> np.ndarray:
    return images.tensors[1].numpy()
