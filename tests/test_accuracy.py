"""Scores against scikit-learn's own."""

import numpy as np
import torch
from sklearn.metrics import f1_score, top_k_accuracy_score

from vitnb import accuracy, data, models, variants


def test_scores_are_scikit_learns():
    random = np.random.RandomState(0)
    logits, labels = torch.from_numpy(random.randn(300, 12)), random.randint(0, 12, 300)
    probabilities, top5 = accuracy.top(logits)
    found = accuracy.scores({"labels": labels.tolist(), "top5": top5.tolist()})
    assert found["images"] == 300
    assert found["top1"] == (logits.argmax(1).numpy() == labels).mean()
    assert found["top5"] == top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(12))
    assert found["f1"] == f1_score(labels, logits.argmax(1), average="weighted")
    torch.testing.assert_close(
        probabilities, torch.exp(logits - logits.logsumexp(1, keepdim=True)).sort(1, descending=True)[0][:, :5]
    )


def test_fewer_than_five_classes():
    assert accuracy.top(torch.randn(7, 3))[1].shape == (7, 3)


def test_predictions_are_those_of_plain_transformers(mini):
    """The same images through the checkpoint without this package's batching, attention or preprocessing code."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    loaded, test = models.load(mini, variants.get("fp32-sdpa")), data.split(mini, "test")
    found = accuracy.predict(loaded, test)
    folder = mini.checkpoint("merged")
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder).eval(),
        AutoImageProcessor.from_pretrained(folder),
    )
    with torch.inference_mode():
        plain = torch.cat([model(**processor(data.read(path), return_tensors="pt")).logits for path in test.paths])
    # Sums in another order; on a GPU, of another device as well.
    torch.testing.assert_close(accuracy.logits(loaded, test, batch_size=5), plain, atol=1e-3, rtol=1e-3)
    assert [row[0] for row in found["top5"]] == plain.argmax(1).tolist()
    assert [model.config.id2label[label] for label in found["labels"]] == [path.parent.name for path in test.paths]


def test_confusion_counts_every_image_once():
    counts = accuracy.confusion({"labels": [0, 1, 2, 2], "top5": [[0], [2], [2], [1]]}, 4)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
