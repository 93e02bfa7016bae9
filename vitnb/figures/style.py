"""What all figures share: colours and markers of the variants, seaborn's theme, and how panels stand."""

from collections.abc import Iterable
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from vitnb import variants

_SOURCE = dict(zip(variants.SOURCE_STUDY, sns.color_palette("colorblind", len(variants.SOURCE_STUDY)), strict=True))


_KINDS = [*variants.CHECKPOINTS, variants.PLAN]


_HUES = dict(zip(_KINDS, sns.color_palette("dark", len(_KINDS)), strict=True))


MARKERS = {"sdpa": "o", "fa2": "^", "math": "s", "eager": "X", "mem-efficient": "D", "flash": "v", "cudnn": "P"}


@cache
def _colour(variant: variants.Variant) -> tuple:
    """The source study's variants have colours of their own; the others that of their weights, lighter from engine to engine."""
    hue = _HUES[variants.PLAN if variant.plan else variant.weights]
    return _SOURCE.get(variant.name) or sns.light_palette(hue, 7)[6 - variants.ENGINES.index(variant.engine)]


def palette(names: Iterable[str]) -> dict[str, tuple]:
    """Return the colour of each variant, by name."""
    return {name: _colour(variants.parse(name)) for name in names}


sns.set_theme(
    style="whitegrid", context="notebook", rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.titleweight": "bold"}
)


def panels(count: int, width: float = 5.6, height: float = 4.0) -> tuple[Figure, np.ndarray]:
    """A figure of ``count`` panels, two beside each other, and their axes [count]; sides in inches."""
    rows, columns = -(-count // 2), min(count, 2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, axes.flat[:count]
