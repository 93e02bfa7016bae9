"""What all figures share: colours and markers of the variants, and seaborn's theme."""

import seaborn as sns

from vitnb import variants

PALETTE = dict(zip(variants.REGISTRY, sns.color_palette("colorblind", len(variants.REGISTRY)), strict=True))
MARKERS = {"sdpa": "o", "fa2": "^", "math": "s"}
sns.set_theme(
    style="whitegrid", context="notebook", rc={"figure.dpi": 90, "savefig.bbox": "tight", "axes.titleweight": "bold"}
)
