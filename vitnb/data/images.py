"""Pictures: the files below a folder, and every kind of file read in one stated way, or refused with a reason."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vitnb.errors import UserError, one_line

# Pictures by their names that Pillow does not read: they are found, and refused with a reason, not passed over in silence.
FOREIGN = {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}


LEFT_OUT = ("__MACOSX",)  # what archivers add beside the images


ImageFile.LOAD_TRUNCATED_IMAGES = False


# Pillow warns where a picture is too large, and refuses twice that: ``read`` refuses both.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(Exception):
    """A file is not a whole picture, or not one that can be read in a stated way: the message is the reason, in one line."""


def visible_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".") and e.name not in LEFT_OUT)


def _walk(folder: str, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in LEFT_OUT:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, (*parts, entry.name))
            elif not os.path.isdir(entry.path):  # a link to a folder above would lead round in circles
                yield (*parts, entry.name)


def image_files(folder: Path) -> list[Path]:
    """The files below a folder whose names look like pictures (or have no ending), sorted; hidden ones left out.

    Whether they are pictures, or can be opened at all, is for ``read`` to say. Raises UserError for a folder that cannot.
    """
    known = Image.registered_extensions().keys() | FOREIGN
    found = (parts for parts in _walk(str(folder), ()) if os.path.splitext(parts[-1])[1].lower() in known | {""})
    try:
        return [Path(folder, *parts) for parts in sorted(found)]
    except PermissionError as error:
        raise UserError(f"cannot open {error.filename}: make it readable, or move it away") from None


def read_image(path: Path) -> Image.Image:
    """One picture as 8-bit RGB, whatever it was:

    ==============================  ======================================================================
    grey, palette, 1 bit, CMYK,     converted by Pillow's formulas; colour profiles are not applied
    YCbCr, Lab
    transparent (alpha, or a        laid on white
    colour)
    16-bit grey                     scaled, 65535 becomes 255
    16-bit colour                   the upper 8 bits, as Pillow reads it
    32-bit integers                 as 16-bit grey if all lie in 0 to 65535, else refused: no range is stated
    floating point                  refused, for the same reason
    turned, by its EXIF             turned back
    animated, or of several pages   the first frame or page; of an icon, the largest
    a wrong ending                  read as what its content is
    more than 89 million pixels     refused before it is decoded (``PIL.Image.MAX_IMAGE_PIXELS``)
    cut, damaged, empty, no         refused; also where only a part, such as the EXIF, is damaged
    picture
    EPS                             refused: it is a program, which Ghostscript would run
    HEIC, SVG, JPEG XL, camera raw  refused: Pillow does not read them
    no file: a pipe, a dead link    refused
    ==============================  ======================================================================

    Raises Unreadable, with the reason, for what is refused.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise UnreadableImage("not a file, or a link to one that is gone")
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "EPS":
                raise UnreadableImage("EPS is a program that Ghostscript would run: save it as PNG")
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise UnreadableImage("floating point has no stated range: save it with 8 or 16 bits")
            if image.mode.startswith("I"):
                image = _eight_bits(np.asarray(image))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except UnreadableImage:
        raise
    except Exception as error:  # whatever Pillow stumbles over: damaged files raise nearly everything
        raise UnreadableImage(_reason(error, path)) from None


def _eight_bits(grey: np.ndarray) -> Image.Image:
    """16-bit grey, [height, width], as 8 bits."""
    if grey.min() < 0 or grey.max() > 65535:
        raise UnreadableImage("32-bit pixels have no stated range: save it with 8 or 16 bits")
    return Image.fromarray((grey.astype(np.float64) / 257).astype(np.uint8))


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels (a decompression bomb?): make it smaller"
    if isinstance(error, UnidentifiedImageError):
        if path.stat().st_size == 0:
            return "the file is empty"
        foreign = path.suffix.lower() in FOREIGN
        return f"Pillow does not read {path.suffix.lower()}: save it as JPEG or PNG" if foreign else "not a picture"
    said = one_line(error).replace(str(path), path.name)
    return said if type(error) is OSError else f"{type(error).__name__}: {said}"
