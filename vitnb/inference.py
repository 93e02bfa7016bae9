"""Classify a folder of images with one variant, and list the unreadable ones."""

import time
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from vitnb.data import dataset
from vitnb.data.images import UnreadableImage, image_files, read_image
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.models.engines import check_finite
from vitnb.models.loader import LoadedVariant
from vitnb.records.parameters import check_parameter
from vitnb.study import Study

BATCH_SIZE = 64
TOP = range(1, 6)  # ranks in a row of predictions
COLUMNS = ["path", *(f"top{k}" for k in TOP), *(f"p{k}" for k in TOP), "error"]


def top_k(scores: torch.Tensor, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most probable classes of each image, the most probable first.

    Args:
        scores: logits [images, classes].

    Returns:
        Probabilities and class indices, [images, min(k, classes)] each.
    """
    return scores.softmax(-1).topk(min(k, scores.shape[1]), dim=-1)


def find_pictures(
    study: Study, images: str | None
) -> tuple[Path, list[Path], list[str]]:
    """Find the images to classify: those of a folder, or the study's test split.

    Args:
        images: a folder; None takes the test split, with or without labels.

    Returns:
        The folder, its images, and the class of each as far as it is known, else "".
        An image in ``images`` is taken to have the class that its own folder is called.

    Raises:
        UserError: the folder is missing, or has no images.
    """
    if images is None:
        test = load_split(study, "test")
        labels = [test.class_names[i] for i in test.labels] or [""] * len(test)
        return test.folder, test.paths, labels
    folder = Path(images).expanduser()
    check_parameter("images", images)
    paths = image_files(folder)
    if not paths:
        raise UserError(
            f"{folder} holds no images: put some there (any format that Pillow reads)"
        )
    return folder, paths, [path.relative_to(folder).parent.name for path in paths]


def classify(
    loaded: LoadedVariant, paths: list[Path], root: Path
) -> tuple[list[dict], float]:
    """Classify images, and count images per second, reading included.

    An unreadable image gets its reason in ``error`` and no classes.

    Returns:
        One row (COLUMNS) for each of ``paths``, with the path relative to ``root``; and
        images per second.

    Raises:
        VariantError: logits are not finite.
    """
    rows = [dict.fromkeys(COLUMNS, "") for _ in paths]
    begin = time.perf_counter()
    for start in range(0, len(paths), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        pixels, readable = _read_batch(loaded, paths[batch], root, rows[batch])
        if not readable:
            continue
        inputs = loaded.prepare(torch.cat(pixels))
        with loaded.inference() as model:
            logits = model(pixel_values=inputs).logits.float().cpu()
        _write_classes(readable, check_finite(logits), loaded.class_names)
    return rows, len(paths) / (time.perf_counter() - begin)


def _read_batch(
    loaded: LoadedVariant, paths: list[Path], root: Path, rows: list[dict]
) -> tuple[list[torch.Tensor], list[dict]]:
    """Fill in the rows' paths and errors; return pixels and rows of readable images.

    Each picture is turned into pixels before the next one is read: a batch of large
    pictures would not fit into memory.
    """
    pixels = []
    readable = []
    for path, row in zip(paths, rows, strict=True):
        row["path"] = _printable(path.relative_to(root).as_posix())
        try:
            pixels.append(dataset.to_pixels([read_image(path)], loaded.processor))
            readable.append(row)
        except UnreadableImage as error:
            row["error"] = _printable(str(error))
    return pixels, readable


def _write_classes(
    rows: list[dict], logits: torch.Tensor, class_names: list[str]
) -> None:
    """Fill in the rows' most probable classes and their probabilities."""
    probabilities, indices = top_k(logits)
    for row, ps, classes in zip(
        rows, probabilities.tolist(), indices.tolist(), strict=True
    ):
        for k, (p, index) in enumerate(zip(ps, classes, strict=True), start=1):
            row[f"top{k}"] = class_names[index]
            row[f"p{k}"] = f"{p:.4f}"


def _printable(text: str) -> str:
    """Escape line breaks, and bytes of a file name that are no UTF-8, for a table."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def predictions_table(rows: list[dict]) -> pd.DataFrame:
    """Return what ``classify`` gave as a table with COLUMNS, for ``Run.save_table``."""
    return pd.DataFrame(rows, columns=COLUMNS)


def gallery_entries(
    rows: list[dict], paths: list[Path], named: list[str], count: int = 12
) -> tuple[list[Image.Image], list[str], list[bool]]:
    """Choose readable images for a gallery, spread over the rows.

    Args:
        rows: what ``classify`` returned.
        paths: what ``find_pictures`` returned, in the rows' order.
        named: the class of each path, or "".

    Returns:
        The images, a title for each, and for each whether its class is the predicted
        one. An unknown class counts as right.
    """
    readable = [i for i, row in enumerate(rows) if not row["error"]]
    chosen = readable[:: max(1, len(readable) // count)][:count]
    titles = [f"{rows[i]['top1']}\n{float(rows[i]['p1']):.0%}" for i in chosen]
    right = [named[i] in ("", rows[i]["top1"]) for i in chosen]
    return [read_image(paths[i]) for i in chosen], titles, right
