"""Accuracy: predictions of a variant on a split, and the scores that follow from them."""

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score

from vitnb import data
from vitnb.models import Loaded

BATCH_SIZE = 64


def logits(loaded: Loaded, split: data.Split, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Logits of every image of a split, float32 [images, classes], in the split's order."""
    found = []
    with loaded.running() as model:
        for pixels, _ in data.batches(data.Pixels(split, loaded.processor), batch_size):
            found.append(model(pixel_values=loaded.to_input(pixels)).logits.float().cpu())
    return torch.cat(found)


def top(scores: torch.Tensor, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and class indices of the k likeliest classes, [images, k] each, likeliest first."""
    return scores.softmax(-1).topk(min(k, scores.shape[1]), dim=-1)


def predict(loaded: Loaded, split: data.Split) -> dict[str, list]:
    """Labels and the five likeliest classes of every image: the raw material of all scores.

    Raises UserError if the checkpoint was trained on other classes than the split's.
    """
    if split.class_names != loaded.class_names:
        raise data.UserError(f"the checkpoint's classes are not those of {split.root}: run finetune on this data first")
    return {"labels": split.labels, "top5": top(logits(loaded, split))[1].tolist()}


def scores(predictions: dict[str, list]) -> dict[str, float]:
    """Top-1, top-5 and weighted F1 (scikit-learn), each between 0 and 1."""
    labels, top5 = np.asarray(predictions["labels"]), np.asarray(predictions["top5"])
    return {
        "images": len(labels),
        "top1": float((top5[:, 0] == labels).mean()),
        "top5": float((top5 == labels[:, None]).any(axis=1).mean()),
        "f1": float(f1_score(labels, top5[:, 0], average="weighted", zero_division=0)),
    }


def confusion(predictions: dict[str, list], classes: int) -> np.ndarray:
    """Counts [classes, classes]: row the true class, column the predicted one."""
    predicted = [row[0] for row in predictions["top5"]]
    return confusion_matrix(predictions["labels"], predicted, labels=range(classes))
