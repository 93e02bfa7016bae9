"""Image files: find them in a folder, and read each one in a stated way.

A file that has no stated way is refused, with a reason in one line. This module loads
no PyTorch.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vitnb.errors import UserError, one_line

READERS = 8  # threads that read images, on a machine with as many cores

# Endings of pictures that Pillow does not read. Such files are listed, so that
# ``read_image`` refuses them with a reason: passing over them would hide them.
CAMERA_RAW = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
FOREIGN = {".heic", ".heif", ".jxl", ".svg"} | CAMERA_RAW
IGNORED_FOLDERS = ("__MACOSX",)  # archivers add these beside the images

ImageFile.LOAD_TRUNCATED_IMAGES = False

# Pillow warns of a picture that is too large, and refuses one of twice that size:
# ``read_image`` refuses both.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(Exception):
    """A file is no whole picture, or has no stated way of reading it.

    The message is the reason, in one line.
    """


def parallel_map(function: Callable, items: Iterable) -> list:
    """Return ``function`` of each item, in order; in threads where cores are many.

    Threads help because Pillow and NumPy release the interpreter's lock.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    if cores < READERS:
        return [function(item) for item in items]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(function, items))


# ---------------------------------------------------------------- finding


def visible_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and _is_visible(e.name))


def image_files(folder: Path) -> list[Path]:
    """Return the files below a folder whose names look like pictures, sorted.

    A name without an ending counts; hidden files and folders do not. Only
    ``read_image`` opens the files.

    Raises:
        UserError: the folder, or one below it, cannot be opened.
    """
    endings = Image.registered_extensions().keys() | FOREIGN | {""}
    try:
        names = sorted(
            parts
            for parts in _walk(str(folder), ())
            if os.path.splitext(parts[-1])[1].lower() in endings
        )
    except PermissionError as error:
        raise UserError(
            f"cannot open {error.filename}: make it readable, or move it away"
        ) from None
    return [Path(folder, *parts) for parts in names]


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in IGNORED_FOLDERS


def _walk(folder: str, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield each visible file below a folder, as the parts of its relative path."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_visible(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, (*parts, entry.name))
            # A link to a folder is left out: a link to one above leads in circles.
            elif not os.path.isdir(entry.path):
                yield (*parts, entry.name)


# ---------------------------------------------------------------- reading


def read_image(path: Path) -> Image.Image:
    """Read one picture as 8-bit RGB, from any format:

    ==============================  ==================================================
    grey, palette, 1 bit, CMYK,     converted by Pillow's formulas; colour profiles
    YCbCr, Lab                      are not applied
    transparent (alpha, or a        laid on white
    colour)
    16-bit grey                     scaled: 65535 becomes 255
    16-bit colour                   the upper 8 bits, as Pillow reads it
    32-bit integers                 as 16-bit grey if all lie in 0 to 65535, else
                                    refused: no range is stated
    floating point                  refused: no range is stated
    turned, by its EXIF             turned back
    animated, or of several pages   the first frame or page; of an icon, the largest
    a wrong ending                  read by its content
    more than 89 million pixels     refused before it is decoded
                                    (``PIL.Image.MAX_IMAGE_PIXELS``)
    cut, damaged, empty, no         refused; also where only a part, such as the EXIF,
    picture                         is damaged
    EPS                             refused: EPS is a program, run by Ghostscript
    HEIC, SVG, JPEG XL, camera raw  refused: Pillow does not read them
    no file: a pipe, a dead link    refused
    ==============================  ==================================================

    Raises:
        UnreadableImage: the picture is refused; the message is the reason.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise UnreadableImage("not a file, or a link to one that is gone")
        with Image.open(path) as image:
            return _decode(image)
    except UnreadableImage:
        raise
    except Exception as error:  # on damaged files Pillow raises nearly everything
        raise UnreadableImage(_explain(error, path)) from None


def _decode(image: Image.Image) -> Image.Image:
    """Convert an opened picture to RGB; raises UnreadableImage to refuse it."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    if image.format == "EPS":
        raise UnreadableImage(
            "EPS is a program that Ghostscript would run: save it as PNG"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UnreadableImage(
            "floating point has no stated range: save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(np.asarray(image))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _scale_to_8_bits(grey: np.ndarray) -> Image.Image:
    """Scale 16-bit grey [height, width] to 8 bits."""
    if grey.min() < 0 or grey.max() > 65535:
        raise UnreadableImage(
            "32-bit pixels have no stated range: save it with 8 or 16 bits"
        )
    return Image.fromarray((grey.astype(np.float64) / 257).astype(np.uint8))


def _explain(error: Exception, path: Path) -> str:
    """Return the reason for one of Pillow's errors, in one line without the folder."""
    if isinstance(error, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        return (
            f"more than {limit:.0f} million pixels (a decompression bomb?): "
            "make it smaller"
        )
    if isinstance(error, UnidentifiedImageError):
        ending = path.suffix.lower()
        if path.stat().st_size == 0:
            return "the file is empty"
        if ending in FOREIGN:
            return f"Pillow does not read {ending}: save it as JPEG or PNG"
        return "not a picture"
    message = one_line(error).replace(str(path), path.name)
    if type(error) is OSError:
        return message
    return f"{type(error).__name__}: {message}"
