"""Duplicates: pictures that lie in two splits. Such a picture of the test was seen in training, and its answer is memory."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations
from pathlib import Path

from PIL import Image

from vitnb.data import dataset
from vitnb.data.images import UnreadableImage, read_image
from vitnb.data.splits import Split

DECODED = 2**30  # bytes of files up to which pixels are compared; decoding as much takes a core half a minute


EXAMPLES = 3


PIECE = 4096  # bytes from the middle of a file that are compared before all of it


def find_duplicates(splits: Iterable[Split]) -> dict:
    """Pictures that are in more than one split, by their content; names and labels play no part.

    Two are the same if they have the same decoded pixels (RGB, turned as their EXIF says), in whatever format. Where the
    files hold more than DECODED bytes, they must be the same file, byte by byte. Not found: copies that were resized, cropped
    or saved again with loss. What cannot be read is left out.

    Returns:
        compared: ``pixels`` or ``files``; images: how many; in_two_splits: {"test and train": pictures of the first that are
        also in the second}; examples: some of the pairs, as paths below the data set's folder.
    """
    named = {split.name: split for split in splits}  # without test images, the validation split may come twice
    owner = {path: name for name, split in named.items() for path in split.paths}
    root = next(iter(named.values())).root
    sizes = {path: path.stat().st_size for path in owner if path.is_file()}
    pixels = sum(sizes.values()) <= DECODED
    left = list(sizes)
    # Each step is dearer than the one before, and sees only what still lies in more than one split.
    for key in (_shape, _content) if pixels else (sizes.get, _piece, _digest):
        groups = defaultdict(list)
        for path, found in zip(left, dataset.parallel_map(_or_none(key), left), strict=True):
            if found is not None:
                groups[found].append(path)
        groups = {key: paths for key, paths in groups.items() if len({owner[path] for path in paths}) > 1}
        left = [path for paths in groups.values() for path in paths]
    counts, examples = Counter(), []
    for paths in groups.values():
        for later, earlier in combinations(reversed(named), 2):
            pair = [[path for path in paths if owner[path] == name] for name in (later, earlier)]
            if all(pair):
                counts[f"{later} and {earlier}"] += len(pair[0])
                examples.append([some[0].relative_to(root).as_posix() for some in pair])
    pairs = {f"{later} and {earlier}": 0 for later, earlier in combinations(reversed(named), 2)}
    return {
        "compared": "pixels" if pixels else "files",
        "images": len(owner),
        "in_two_splits": pairs | counts,
        "examples": examples[:EXAMPLES],
    }


def describe_duplicates(found: dict) -> str:
    """What ``find`` found, in one line."""
    by = "pixel by pixel" if found["compared"] == "pixels" else "byte by byte"
    if not any(found["in_two_splits"].values()):
        return (
            f"no picture is in two splits ({found['images']} compared {by}; copies that were saved anew are not found)"
        )
    counts = ", ".join(f"{count} in {pair}" for pair, count in found["in_two_splits"].items() if count)
    examples = ", ".join(f"{a} = {b}" for a, b in found["examples"])
    return f"warning: the same picture in two splits, compared {by}: {counts}; such as {examples}"


def _or_none(key: Callable[[Path], Hashable]) -> Callable[[Path], Hashable | None]:
    def found(path: Path) -> Hashable | None:
        try:
            return key(path)
        except (UnreadableImage, OSError):
            return None

    return found


def _shape(path: Path) -> Hashable | None:
    """Sides in pixels, from the file's head; in no order, as EXIF may turn the picture."""
    try:
        with Image.open(path) as image:
            return tuple(sorted(image.size))
    except Exception:  # whatever Pillow stumbles over: ``read`` gives the reason elsewhere
        return None


def _content(path: Path) -> Hashable:
    image = read_image(path)
    return image.size, hashlib.sha256(image.tobytes()).digest()


def _piece(path: Path) -> Hashable:
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        return path.stat().st_size, file.read(PIECE)


def _digest(path: Path) -> Hashable:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
