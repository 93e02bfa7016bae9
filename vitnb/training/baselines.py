"""Floors: what simple classifiers reach on the same images, so that nobody takes an easy data set for a good model."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import TensorDataset
from transformers import AutoConfig, AutoModelForImageClassification

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.models import layers, pretrained
from vitnb.study import Study

STRENGTHS = (0.01, 0.1, 1.0)  # C of a logistic regression: the smaller, the more it is held back


def measure_baselines(study: Study, train: Split, test: Split, processor) -> dict[str, float | list[int]]:
    """The three floors, as top-1 on ``test``, and on how many images each was fitted and tested (see ``held.spread``).

    Returns:
        pixels: of ``on_pixels``; untrained: of ``on_untrained_base``; probe: of ``on_base``; images: [fitted, tested].
    """
    seen = dataset.load_into_memory(train, processor), dataset.load_into_memory(test, processor)
    return {
        "pixels": pixel_baseline(*seen),
        "untrained": random_init_baseline(study, len(train.class_names), *seen),
        "probe": linear_probe(study, train.class_names, *seen),
        "images": [len(part) for part in seen],
    }


def pixel_baseline(train: TensorDataset, test: TensorDataset) -> float:
    """Test top-1 of a linear classifier (ridge regression on one-hot labels, scikit-learn) on the pixels themselves."""
    rows = [part.tensors[0].flatten(1).numpy() for part in (train, test)]
    return float(RidgeClassifier(alpha=1e3).fit(rows[0], _labels(train)).score(rows[1], _labels(test)))


@torch.no_grad()
def _features(model, images: TensorDataset) -> np.ndarray:
    """What the head would see, [images, hidden]."""
    seen, on = [], devices.select_device()
    hook = model.get_submodule(layers.head_name(model)).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].float().cpu())
    )
    with devices.autocast(on):
        for pixels, _ in dataset.make_batches(images, dataset.BATCH_SIZE):
            model(pixel_values=pixels.to(on))
    hook.remove()
    return torch.cat(seen).numpy()


def _probe(model, train: TensorDataset, test: TensorDataset) -> float:
    """Test top-1 of a trained head (logistic regression, scikit-learn) on a frozen model.

    How much it is held back is chosen by twofold cross-validation on ``train``, as a floor that overfits is no floor.
    """
    # A tenth of this tolerance took three times as long and moved top-1 by 0.2 points at most.
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    if np.unique(_labels(train), return_counts=True)[1].min() > 1:
        head = GridSearchCV(head, {"logisticregression__C": STRENGTHS}, cv=2)
    head.fit(_features(model, train), _labels(train))
    return float(head.score(_features(model, test), _labels(test)))


def _labels(images: TensorDataset) -> np.ndarray:
    return images.tensors[1].numpy()


def random_init_baseline(study: Study, classes: int, train: TensorDataset, test: TensorDataset) -> float:
    """Test top-1 of a trained head on the base's architecture with random weights."""
    config = AutoConfig.from_pretrained(pretrained.find_base(study), num_labels=classes)
    with devices.select_device():  # drawn where it is used: a GPU fills a large model in no time
        # the base itself may be in 16 bits
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32).eval()
    return _probe(model, train, test)


def linear_probe(study: Study, class_names: list[str], train: TensorDataset, test: TensorDataset) -> float:
    """Test top-1 of a trained head on the frozen base, a linear probe: what fine-tuning should at least reach."""
    return _probe(pretrained.load_base(study, class_names).eval(), train, test)
