"""Draw images in a grid, with their names."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image


def gallery(
    images: list[Image.Image],
    titles: list[str],
    right: list[bool] | None = None,
    columns: int = 6,
) -> Figure:
    """Draw a grid of images with titles.

    Args:
        right: whether each title is a correct prediction; wrong ones are red.
    """
    rows = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.1 * columns, 2.4 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.axis("off")
    entries = zip(axes.flat, images, titles, strict=False)
    for i, (axis, image, title) in enumerate(entries):
        wrong = right and not right[i]
        axis.imshow(image)
        axis.set_title(
            title, fontsize=8, color="#b03030" if wrong else "0.2", fontweight="normal"
        )
    return figure
