"""Set what all figures share: colours, markers, seaborn's theme and panels."""

from collections.abc import Iterable
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from vitnb import variants

MARKERS = {
    "sdpa": "o",
    "fa2": "^",
    "math": "s",
    "eager": "X",
    "mem-efficient": "D",
    "flash": "v",
    "cudnn": "P",
}
NATS = "KL to full precision (nats)"

_SOURCE_COLOURS = dict(
    zip(
        variants.SOURCE_STUDY,
        sns.color_palette("colorblind", len(variants.SOURCE_STUDY)),
        strict=True,
    )
)
_KINDS = [*variants.CHECKPOINTS, variants.PLAN]
_HUES = dict(zip(_KINDS, sns.color_palette("dark", len(_KINDS)), strict=True))

sns.set_theme(
    style="whitegrid",
    context="notebook",
    rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.titleweight": "bold"},
)


@cache
def _colour(variant: variants.Variant) -> tuple:
    """Return a variant's colour.

    Variants of the source study have their own. The colour of any other variant follows
    from its weights, and is lighter from engine to engine.
    """
    if variant.name in _SOURCE_COLOURS:
        return _SOURCE_COLOURS[variant.name]
    hue = _HUES[variants.PLAN if variant.plan else variant.weights]
    return sns.light_palette(hue, 7)[6 - variants.ENGINES.index(variant.engine)]


def palette(names: Iterable[str]) -> dict[str, tuple]:
    """Return the colour of each variant, by name."""
    return {name: _colour(variants.parse(name)) for name in names}


def panels(
    count: int, width: float = 5.6, height: float = 4.0
) -> tuple[Figure, np.ndarray]:
    """Return a figure of ``count`` panels, two side by side, and their axes [count].

    Args:
        width, height: of one panel, in inches.
    """
    rows, columns = -(-count // 2), min(count, 2)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        layout="constrained",
    )
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, axes.flat[:count]
