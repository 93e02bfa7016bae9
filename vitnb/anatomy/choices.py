"""Defects of choosing: the best of many noisy numbers is quoted as if it had not been chosen (13, 14)."""

import numpy as np

from vitnb import statistics
from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.models.layers import head_name


def _pool(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the validation and the test images, neither of which trained the head."""
    features = np.vstack([bench.features["valid"], bench.features["test"]])
    return features, np.append(bench.valid.labels, bench.test.labels)


def _heads(bench: Bench, count: int, random: np.random.Generator) -> list[np.ndarray]:
    """Heads by ridge regression, each on another half of the training images: nearly alike in truth."""
    features, labels = bench.features["train"], bench.train.labels
    features = np.column_stack([features, np.ones(len(features))])
    targets = np.eye(len(bench.class_names))[labels]
    found = []
    for _ in range(count):
        drawn = random.choice(len(labels), len(labels) // 2, replace=False)
        x, y = features[drawn], targets[drawn]
        found.append(np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y))
    return found


def chosen_on(bench: Bench, heads: int = 40, images: int = 204, repeats: int = 200) -> Case:
    """Defect 13. Done wrong: of many checkpoints the best on some images is taken, and its top-1 on those very images
    is quoted. Done instead: its top-1 on images that chose nothing.

    Validation and test images are shuffled together ``repeats`` times, so that no split can be the easier one.
    ``extra["pairs"]`` holds (top-1 on the images that chose, top-1 on the others) of every repeat's chosen head.
    """
    random = np.random.default_rng(bench.seed)
    features, labels = _pool(bench)
    images = min(images, len(labels) // 2)
    features = np.column_stack([features, np.ones(len(features))])
    right = np.array([(features @ head).argmax(1) == labels for head in _heads(bench, heads, random)])
    pairs = []
    for _ in range(repeats):
        order = random.permutation(len(labels))
        choosing, untouched = right[:, order[:images]].mean(1), right[:, order[images:]].mean(1)
        best = choosing.argmax()
        pairs.append((choosing[best], untouched[best]))
    wrong, sound = np.mean(pairs, axis=0)
    return Case(
        13, "Judged by the images that chose it", f"best of {heads} heads by {images} images, mean of {repeats} draws", "top-1",
        float(wrong), float(sound), "Touch the test split once, and never to choose.", {"pairs": pairs},
    )  # fmt: skip


def best_layer(bench: Bench, layers: int = 24, images: int = 102, repeats: int = 50, noise: float = 0.3) -> Case:
    """Defect 14. Done wrong: layers are ranked by the top-1 that keeping them gains on few images. Done instead: the
    winner is judged on images that did not rank it, and all by a paired test corrected for the number of layers.

    All "layers" are equally sensitive here, because we make them so: keeping any of them is another draw of the same
    noise on the real model's logits (``noise`` is in standard deviations of the logits). So whatever the best one gains
    is chance. The images are shuffled ``repeats`` times; ``extra`` holds the gains of the first time, the share of
    predictions that the noise changes, and how often a corrected paired test on those few images finds a layer.
    """
    random = np.random.default_rng(bench.seed)
    head = bench.model.get_submodule(head_name(bench.model))
    weight, bias = (tensor.detach().cpu().double().numpy() for tensor in (head.weight, head.bias))
    features, labels = _pool(bench)
    logits = features @ weight.T + bias
    spread = noise * logits.std()
    predicted = np.array(
        [(logits + spread * random.standard_normal(logits.shape)).argmax(1) for _ in range(layers + 1)]
    )
    none, kept = predicted[0] == labels, predicted[1:] == labels
    images = min(images, len(labels) // 2)
    ranked, found = [], 0
    for _ in range(repeats):
        order = random.permutation(len(labels))
        few, others = (100 * (kept[:, part].mean(1) - none[part].mean()) for part in (order[:images], order[images:]))
        ranked.append((few, others))
        drawn = order[:images]
        found += min(statistics.holm([statistics.mcnemar(none[drawn], right[drawn])[2] for right in kept])) < 0.05
    wrong, sound = np.mean([(few.max(), others[few.argmax()]) for few, others in ranked], axis=0)
    return Case(
        14, "The best of layers that are all alike", f"best of {layers} on {images} images, mean of {repeats} draws",
        "points gained", float(wrong), float(sound), "Paired, on many images, corrected for the number of tests.",
        {"few": ranked[0][0], "others": ranked[0][1], "images": (images, len(labels) - images),
         "changed": float((predicted[0] != logits.argmax(1)).mean()), "found by the paired test": float(found / repeats)},
    )  # fmt: skip
