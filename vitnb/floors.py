"""Floors: what simple classifiers reach on the same images, so that nobody takes an easy data set for a good model."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoModelForImageClassification

from vitnb import data, models, quantize, studies, training


def _pixels(split: data.Split, processor) -> np.ndarray:
    return np.concatenate([pixels.flatten(1).numpy() for pixels, _ in data.batches(data.Pixels(split, processor), 128)])


def on_pixels(train: data.Split, test: data.Split, processor) -> float:
    """Test top-1 of a linear classifier (ridge regression on one-hot labels, scikit-learn) on the pixels themselves."""
    classifier = RidgeClassifier(alpha=1e3).fit(_pixels(train, processor), train.labels)
    return float(classifier.score(_pixels(test, processor), test.labels))


@torch.no_grad()
def _features(model, split: data.Split, processor) -> np.ndarray:
    """What the head would see, [images, hidden]."""
    seen, on = [], models.device()
    hook = model.get_submodule(quantize.head(model)).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].float().cpu())
    )
    with training.precision(on):
        for pixels, _ in data.batches(data.Pixels(split, processor), 128):
            model(pixel_values=pixels.to(on))
    hook.remove()
    return torch.cat(seen).numpy()


def _probe(model, train: data.Split, test: data.Split, processor) -> float:
    """Test top-1 of a trained head (logistic regression, scikit-learn) on a frozen model."""
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(
        _features(model, train, processor), train.labels
    )
    return float(head.score(_features(model, test, processor), test.labels))


def on_untrained_base(study: studies.Study, train: data.Split, test: data.Split, processor) -> float:
    """Test top-1 of a trained head on the base's architecture with random weights."""
    config = AutoConfig.from_pretrained(models.find_base(study), num_labels=len(train.class_names))
    model = AutoModelForImageClassification.from_config(config).to(models.device()).eval()
    return _probe(model, train, test, processor)


def on_base(study: studies.Study, train: data.Split, test: data.Split, processor) -> float:
    """Test top-1 of a trained head on the frozen base, a linear probe: what fine-tuning should at least reach."""
    return _probe(models.load_base(study, train.class_names).eval(), train, test, processor)
