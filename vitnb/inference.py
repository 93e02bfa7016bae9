"""Inference: a folder of images through one variant, a row for each, unreadable ones listed with their reason."""

import csv
import io
import time
from pathlib import Path

import torch

from vitnb.data import dataset
from vitnb.data.images import UnreadableImage, image_files, read_image
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.models.loader import LoadedVariant
from vitnb.records.files import write_file
from vitnb.study import Study


def top_k(scores: torch.Tensor, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and class indices of the k likeliest classes, [images, k] each, likeliest first."""
    return scores.softmax(-1).topk(min(k, scores.shape[1]), dim=-1)


BATCH_SIZE = 64


COLUMNS = ["path", *(f"top{k}" for k in range(1, 6)), *(f"p{k}" for k in range(1, 6)), "error"]


def find_pictures(study: Study, images: str | None) -> tuple[Path, list[Path], list[str]]:
    """The folder, the images in it that are to be named, and the class of each as far as it is known, else "".

    They are those of ``images``, where a class is what the folder around a picture is called; or the study's test split,
    labelled or not. Raises UserError if the folder is missing or holds no images.
    """
    if images is None:
        test = load_split(study, "test")
        return test.folder, test.paths, [test.class_names[i] for i in test.labels] or [""] * len(test)
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: 'images' takes a folder of pictures, or nothing for the test split")
    found = image_files(folder)
    if not found:
        raise UserError(f"{folder} holds no images: put some there (any format that Pillow reads)")
    return folder, found, [path.relative_to(folder).parent.name for path in found]


def classify(loaded: LoadedVariant, paths: list[Path], root: Path) -> tuple[list[dict], float]:
    """Rows (COLUMNS; path relative to ``root``) in the order of ``paths``, and images per second, reading included.

    A file that is not a whole image gets its reason in ``error`` and no names; the others go on.
    """
    rows, begin = [], time.perf_counter()
    with loaded.inference() as model:
        for at in range(0, len(paths), BATCH_SIZE):
            chunk, pixels = [], []
            for path in paths[at : at + BATCH_SIZE]:
                row = dict.fromkeys(COLUMNS, "") | {"path": _printable(path.relative_to(root).as_posix())}
                rows.append(row)
                try:  # one picture in memory at a time: a batch of large ones would not fit
                    pixels.append(dataset.to_pixels([read_image(path)], loaded.processor))
                    chunk.append(row)
                except UnreadableImage as error:
                    row["error"] = _printable(str(error))
            if not pixels:
                continue
            logits = model(pixel_values=loaded.prepare(torch.cat(pixels))).logits.float().cpu()
            for row, ps, classes in zip(chunk, *(part.tolist() for part in top_k(logits)), strict=True):
                for k, (p, index) in enumerate(zip(ps, classes, strict=True), start=1):
                    row[f"top{k}"], row[f"p{k}"] = loaded.class_names[index], f"{p:.4f}"
    return rows, len(paths) / (time.perf_counter() - begin)


def _printable(text: str) -> str:
    """Text for one line of a table: line breaks, and bytes of a file's name that are no UTF-8, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def write_predictions(rows: list[dict], path: Path) -> Path:
    """Write the rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())
    return path


def gallery_entries(
    rows: list[dict], paths: list[Path], named: list[str], count: int = 12
) -> tuple[list, list[str], list[bool]]:
    """Readable images spread over the rows, a title for each, and whether the prediction is its class (or that is unknown).

    ``paths`` and ``named``: what ``sources`` gave, in the rows' order.
    """
    readable = [i for i, row in enumerate(rows) if not row["error"]]
    chosen = readable[:: max(1, len(readable) // count)][:count]
    titles = [f"{rows[i]['top1']}\n{float(rows[i]['p1']):.0%}" for i in chosen]
    right = [named[i] in ("", rows[i]["top1"]) for i in chosen]
    return [read_image(paths[i]) for i in chosen], titles, right
