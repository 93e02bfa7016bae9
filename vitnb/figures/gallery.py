"""TODO."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image


def gallery(images: list[Image.Image], titles: list[str], right: list[bool] | None = None, columns: int = 6) -> Figure:
    """A grid of pictures with titles; a wrong prediction's title is red."""
    lines = max(1, -(-len(images) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.1 * columns, 2.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image, title) in enumerate(zip(axes.flat, images, titles, strict=False)):
        axis.imshow(image)
        axis.set_title(title, fontsize=8, color="#b03030" if right and not right[i] else "0.2", fontweight="normal")
    return figure
