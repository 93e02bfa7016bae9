"""Find images that occur in two splits.

A test image that is also in the training split tests the model's memory. The report
describes duplicates too, so this module loads no PyTorch.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations
from pathlib import Path

from PIL import Image

from vitnb.data.images import UnreadableImage, parallel_map, read_image

# Largest data set, in bytes of files, whose pixels are compared. Decoding as much takes
# one core half a minute.
DECODED = 2**30
EXAMPLES = 3  # pairs that are named
PIECE = 4096  # bytes from the middle of a file, compared before the whole file


def find_duplicates(splits: Iterable) -> dict:
    """Find pictures that are in more than one split, by content.

    File names and labels play no part. Two pictures are equal if their decoded pixels
    are (RGB, turned as the EXIF says), in whatever format. Where the files hold more
    than DECODED bytes, two pictures are equal if their files are, byte by byte. Copies
    that were resized, cropped or saved again with loss are not found. Files that cannot
    be read are left out.

    Args:
        splits: one or more of ``vitnb.data.splits.Split``, of one data set.

    Returns:
        compared: ``pixels`` or ``files``. images: the number of images. in_two_splits:
        for each pair of splits, such as "test and train", how many pictures of the
        first are also in the second. examples: up to EXAMPLES pairs, as paths relative
        to the data set's folder.
    """
    # Without test images, the validation split may come twice: once is enough.
    by_name = {split.name: split for split in splits}
    split_of = {path: name for name, split in by_name.items() for path in split.paths}
    sizes = {path: path.stat().st_size for path in split_of if path.is_file()}
    compare_pixels = sum(sizes.values()) <= DECODED
    keys = (_shape, _content) if compare_pixels else (sizes.get, _piece, _digest)
    groups = _group_equal(list(sizes), keys, split_of)
    counts, examples = _count_pairs(groups, by_name, split_of)
    return {
        "compared": "pixels" if compare_pixels else "files",
        "images": len(split_of),
        "in_two_splits": counts,
        "examples": examples[:EXAMPLES],
    }


def describe_duplicates(found: dict) -> str:
    """Return the result of ``find_duplicates`` as one line of text."""
    by = "pixel by pixel" if found["compared"] == "pixels" else "byte by byte"
    if not any(found["in_two_splits"].values()):
        return (
            f"no picture is in two splits ({found['images']} compared {by}; "
            "copies that were saved anew are not found)"
        )
    counts = ", ".join(
        f"{count} in {pair}" for pair, count in found["in_two_splits"].items() if count
    )
    examples = ", ".join(f"{a} = {b}" for a, b in found["examples"])
    told = f"warning: the same picture in two splits, compared {by}: {counts}"
    return f"{told}; such as {examples}" if examples else told


def _group_equal(
    paths: list[Path],
    keys: Iterable[Callable[[Path], Hashable]],
    split_of: dict[Path, str],
) -> list[list[Path]]:
    """Return the groups of equal files that reach over several splits.

    Each key costs more than the one before. So each key is computed only for files
    that the keys before it left in a group over several splits.
    """
    groups = []
    for key in keys:
        by_key = defaultdict(list)
        values = parallel_map(_none_if_unreadable(key), paths)
        for path, value in zip(paths, values, strict=True):
            if value is not None:
                by_key[value].append(path)
        groups = [
            group
            for group in by_key.values()
            if len({split_of[path] for path in group}) > 1
        ]
        paths = [path for group in groups for path in group]
    return groups


def _count_pairs(
    groups: list[list[Path]], by_name: dict, split_of: dict[Path, str]
) -> tuple[dict[str, int], list[list[str]]]:
    """Return, for each pair of splits, the pictures in both; and an example a group."""
    root = next(iter(by_name.values())).root
    pairs = list(combinations(reversed(by_name), 2))
    counts = Counter({f"{later} and {earlier}": 0 for later, earlier in pairs})
    examples = []
    for group in groups:
        for later, earlier in pairs:
            in_later = [path for path in group if split_of[path] == later]
            in_earlier = [path for path in group if split_of[path] == earlier]
            if in_later and in_earlier:
                counts[f"{later} and {earlier}"] += len(in_later)
                examples.append(
                    [
                        path.relative_to(root).as_posix()
                        for path in (in_later[0], in_earlier[0])
                    ]
                )
    return dict(counts), examples


def _none_if_unreadable(
    key: Callable[[Path], Hashable],
) -> Callable[[Path], Hashable | None]:
    """Wrap a key so that an unreadable file has None as its value."""

    def key_or_none(path: Path) -> Hashable | None:
        try:
            return key(path)
        except (UnreadableImage, OSError):
            return None

    return key_or_none


def _shape(path: Path) -> Hashable | None:
    """Return the sides in pixels, from the file's header.

    The sides are sorted, because EXIF may turn the picture.
    """
    try:
        with Image.open(path) as image:
            return tuple(sorted(image.size))
    except Exception:  # on damaged files Pillow raises nearly everything
        return None


def _content(path: Path) -> Hashable:
    """Return the size and the SHA-256 of the decoded pixels."""
    image = read_image(path)
    return image.size, hashlib.sha256(image.tobytes()).digest()


def _piece(path: Path) -> Hashable:
    """Return the file's size and PIECE bytes from its middle."""
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        return path.stat().st_size, file.read(PIECE)


def _digest(path: Path) -> Hashable:
    """Return the SHA-256 of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
