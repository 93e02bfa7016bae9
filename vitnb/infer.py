"""Inference: a folder of images through one variant, a row for each, unreadable ones listed with their reason."""

import csv
import io
import time
from pathlib import Path

from vitnb import accuracy, data, studies
from vitnb.errors import UserError, one_line
from vitnb.models import Loaded
from vitnb.records import write_whole

BATCH_SIZE = 64
COLUMNS = ["path", *(f"top{k}" for k in range(1, 6)), *(f"p{k}" for k in range(1, 6)), "error"]


def sources(study: studies.Study, images: str | None) -> tuple[Path, list[Path]]:
    """The folder and the images in it that are to be named: ``images``, or the study's test split.

    Raises UserError if the folder is missing or holds no images.
    """
    if images is None:
        test = data.split(study, "test")
        return test.root / "test", test.paths
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: 'images' takes a folder of pictures, or nothing for the test split")
    found = data.image_files(folder)
    if not found:
        raise UserError(f"{folder} holds no images: put some there (any format that Pillow reads)")
    return folder, found


def classify(loaded: Loaded, paths: list[Path], root: Path) -> tuple[list[dict], float]:
    """Rows (COLUMNS; path relative to ``root``) in the order of ``paths``, and images per second, reading included.

    A file that is not a whole image gets its reason in ``error`` and no names; the others go on.
    """
    rows, begin = [], time.perf_counter()
    with loaded.running() as model:
        for at in range(0, len(paths), BATCH_SIZE):
            chunk, images = [], []
            for path in paths[at : at + BATCH_SIZE]:
                row = dict.fromkeys(COLUMNS, "") | {"path": path.relative_to(root).as_posix()}
                rows.append(row)
                try:
                    images.append(data.read(path))
                    chunk.append(row)
                except data.UNREADABLE as error:
                    row["error"] = f"{type(error).__name__}: {one_line(error)}".replace(str(path), path.name)
            if not images:
                continue
            logits = model(pixel_values=loaded.to_input(data.to_pixels(images, loaded.processor))).logits.float().cpu()
            for row, ps, classes in zip(chunk, *(part.tolist() for part in accuracy.top(logits)), strict=True):
                for k, (p, index) in enumerate(zip(ps, classes, strict=True), start=1):
                    row[f"top{k}"], row[f"p{k}"] = loaded.class_names[index], f"{p:.4f}"
    return rows, len(paths) / (time.perf_counter() - begin)


def write_csv(rows: list[dict], path: Path) -> Path:
    """Write the rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
    return path


def pictures(rows: list[dict], root: Path, count: int = 12) -> tuple[list, list[str], list[bool]]:
    """Readable images spread over the rows, a title for each, and whether its folder bears the predicted name."""
    readable = [row for row in rows if not row["error"]]
    chosen = readable[:: max(1, len(readable) // count)][:count]
    titles = [f"{row['top1']}\n{float(row['p1']):.0%}" for row in chosen]
    right = [Path(row["path"]).parent.name in ("", row["top1"]) for row in chosen]
    return [data.read(root / row["path"]) for row in chosen], titles, right
