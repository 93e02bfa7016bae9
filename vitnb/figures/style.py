"""What all figures share: colours and markers of the variants, and seaborn's theme."""

import seaborn as sns

from vitnb import variants

_SOURCE = dict(zip(variants.SOURCE, sns.color_palette("colorblind", len(variants.SOURCE)), strict=True))
_HUES = dict(zip(variants.CHECKPOINTS, sns.color_palette("dark", len(variants.CHECKPOINTS)), strict=True))
# The source study's variants have colours of their own; the others that of their weights, lighter from engine to engine.
PALETTE = {
    name: _SOURCE.get(name) or sns.light_palette(_HUES[v.weights], 7)[6 - variants.ENGINES.index(v.engine)]
    for name, v in variants.REGISTRY.items()
}
MARKERS = {"sdpa": "o", "fa2": "^", "math": "s", "eager": "X", "mem-efficient": "D", "flash": "v", "cudnn": "P"}
sns.set_theme(
    style="whitegrid", context="notebook", rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.titleweight": "bold"}
)
