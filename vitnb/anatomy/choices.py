"""Defects of choosing: the best of many noisy numbers is quoted as is (13, 14)."""

import numpy as np

from vitnb import statistics
from vitnb.anatomy.bench import Bench
from vitnb.anatomy.case import Case
from vitnb.models.layers import head_name


def _pool(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels of all images that did not train the head."""
    features = np.vstack([bench.features["valid"], bench.features["test"]])
    return features, np.append(bench.valid.labels, bench.test.labels)


def _with_ones(features: np.ndarray) -> np.ndarray:
    """Append a column of ones, for the offsets: [images, width + 1]."""
    return np.column_stack([features, np.ones(len(features))])


def _heads(bench: Bench, count: int, random: np.random.Generator) -> list[np.ndarray]:
    """Fit heads by ridge regression, each on another half of the training images.

    All are about equally good. Returns ``count`` arrays, [width + 1, classes] each.
    """
    features, labels = _with_ones(bench.features["train"]), bench.train.labels
    targets = np.eye(len(bench.class_names))[labels]
    heads = []
    for _ in range(count):
        drawn = random.choice(len(labels), len(labels) // 2, replace=False)
        x, y = features[drawn], targets[drawn]
        heads.append(np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y))
    return heads


def chosen_on(
    bench: Bench, heads: int = 40, images: int = 204, repeats: int = 200
) -> Case:
    """Reproduce defect 13.

    Wrong: of many checkpoints the best on some images is taken, and its top-1 on those
    very images is quoted. Right: its top-1 on images that chose nothing.

    Validation and test images are shuffled together ``repeats`` times, so that no split
    can be the easier one. ``extra["pairs"]`` holds for every repeat the chosen head's
    top-1 on the images that chose, and on the others.
    """
    random = np.random.default_rng(bench.seed)
    features, labels = _pool(bench)
    features = _with_ones(features)
    images = min(images, len(labels) // 2)
    predicted = [(features @ head).argmax(1) for head in _heads(bench, heads, random)]
    correct = np.array(predicted) == labels
    pairs = []
    for _ in range(repeats):
        order = random.permutation(len(labels))
        choosing = correct[:, order[:images]].mean(1)
        untouched = correct[:, order[images:]].mean(1)
        best = choosing.argmax()
        pairs.append((choosing[best], untouched[best]))
    wrong, right = np.mean(pairs, axis=0)
    return Case(
        number=13,
        title="Judged by the images that chose it",
        what=f"best of {heads} heads by {images} images, mean of {repeats} draws",
        unit="top-1",
        wrong=float(wrong),
        right=float(right),
        lesson="Touch the test split once, and never to choose.",
        extra={"pairs": pairs},
    )


def best_layer(
    bench: Bench,
    layers: int = 24,
    images: int = 102,
    repeats: int = 50,
    noise: float = 0.3,
) -> Case:
    """Reproduce defect 14.

    Wrong: layers are ranked by the top-1 that keeping them gains on few images. Right:
    the winner is judged on images that did not rank it, and all layers by a paired test
    corrected for their number.

    All "layers" are equally sensitive here by construction: keeping any of them draws
    new noise on the real model's logits (``noise`` is in standard deviations of the
    logits). So whatever the best one gains is chance. The images are shuffled
    ``repeats`` times. ``extra`` holds the gains of the first time, the share of
    predictions that the noise changes, and how often a corrected paired test on those
    few images finds a layer.
    """
    random = np.random.default_rng(bench.seed)
    logits, labels = _pool_logits(bench)
    predicted = _noisy_predictions(logits, layers + 1, noise, random)
    none, kept = predicted[0] == labels, predicted[1:] == labels
    images = min(images, len(labels) // 2)
    gains = []
    significant = 0
    for _ in range(repeats):
        order = random.permutation(len(labels))
        few, others = order[:images], order[images:]
        gains.append((_gain(none, kept, few), _gain(none, kept, others)))
        p = [statistics.mcnemar(none[few], layer[few])[2] for layer in kept]
        significant += min(statistics.holm(p)) < 0.05
    pairs = [(few.max(), others[few.argmax()]) for few, others in gains]
    wrong, right = np.mean(pairs, axis=0)
    return Case(
        number=14,
        title="The best of layers that are all alike",
        what=f"best of {layers} on {images} images, mean of {repeats} draws",
        unit="points gained",
        wrong=float(wrong),
        right=float(right),
        lesson="Paired, on many images, corrected for the number of tests.",
        extra={
            "few": gains[0][0],
            "others": gains[0][1],
            "images": (images, len(labels) - images),
            "changed": float((predicted[0] != logits.argmax(1)).mean()),
            "found by the paired test": float(significant / repeats),
        },
    )


def _pool_logits(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """Return the fitted model's logits and the labels of the pool's images."""
    head = bench.model.get_submodule(head_name(bench.model))
    weight = head.weight.detach().cpu().double().numpy()
    bias = head.bias.detach().cpu().double().numpy()
    features, labels = _pool(bench)
    return features @ weight.T + bias, labels


def _noisy_predictions(
    logits: np.ndarray, count: int, noise: float, random: np.random.Generator
) -> np.ndarray:
    """Predict ``count`` times, each time with new noise: int [count, images]."""
    spread = noise * logits.std()
    return np.array(
        [
            (logits + spread * random.standard_normal(logits.shape)).argmax(1)
            for _ in range(count)
        ]
    )


def _gain(none: np.ndarray, kept: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return the points of top-1 that each layer gains on some images, [layers]."""
    return 100 * (kept[:, images].mean(1) - none[images].mean())
