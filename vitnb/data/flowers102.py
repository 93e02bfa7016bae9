"""Oxford Flowers-102: download it, and read its official splits.

The data set is used as published: ``jpg/``, ``imagelabels.mat`` and ``setid.mat``. An
interrupted download resumes. Every file's checksum is verified, and the folder appears
only when it is complete.

M.-E. Nilsback, A. Zisserman, *Automated Flower Classification over a Large Number of
Classes*, ICVGIP 2008. https://www.robots.ox.ac.uk/~vgg/data/flowers/102/
"""

import hashlib
import http.client
import re
import ssl
import tarfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from vitnb.errors import UserError, one_line, suggest
from vitnb.records.files import MB, new_folder

CHUNK = 2**20  # bytes read at once
TELL_EVERY = 5.0  # seconds between lines of progress
TRIES = 5  # attempts in a row that bring no byte, before giving up
PICTURES = "the pictures of Flowers-102"  # see ``files.new_folder``
PAUSE = 2.0  # seconds before the second attempt; later pauses are longer
TIMEOUT = 30.0  # seconds without a byte

# Errors of a lost connection.
LOST = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)

# ---------------------------------------------------------------- download


@dataclass(frozen=True)
class Source:
    """A published data set: the URL of its folder, and the MD5 of each file."""

    url: str
    files: dict[str, str]  # name -> MD5


SOURCES = {
    "flowers-102": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        {  # the MD5s are torchvision's
            "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
            "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
            "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
        },
    )
}


def download(name: str, to: Path) -> Path:
    """Download a data set of SOURCES to the folder ``to``, and return the folder.

    A complete folder is left as it is. Files of an unfinished download lie in
    ``<to>.part``, where the next call resumes. Files that a user put there count, if
    their checksums are right. Prints lines of progress.

    Raises:
        UserError: an unknown name, a folder with other content, no connection, a wrong
            checksum, or a full disk.
    """
    if name not in SOURCES:
        raise UserError(f"no data set '{name}' to download: {suggest(name, SOURCES)}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        try:
            official_splits(to)
        except UserError as error:
            raise UserError(
                f"{to} is there and not whole: move it away, "
                f"or name another with --to ({error})"
            ) from None
        print(f"{to} is there, and whole", flush=True)
        return to
    part = to.with_name(f"{to.name}.part")
    try:
        _download_into(part, SOURCES[name])
        if to.exists():
            to.rmdir()
        part.rename(to)
    except OSError as error:
        raise UserError(
            f"cannot write {part} ({one_line(error)}): "
            "make room or name another folder with --to"
        ) from None
    return to


def _download_into(folder: Path, source: Source) -> None:
    """Fetch and unpack all files of a source, and check that the splits can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, md5 in source.files.items():
        fetch(source.url + file, folder / file, md5)
    archive = folder / "102flowers.tgz"
    _unpack(archive, folder)
    official_splits(folder)
    archive.unlink()


def fetch(url: str, path: Path, md5: str) -> None:
    """Download one file, and give it its name once its MD5 is right.

    An unfinished download lies in ``<path>.part``. Lost connections are retried until
    TRIES attempts in a row bring no byte.

    Raises:
        UserError: the file cannot be had, or is another than was published.
    """
    if path.is_file() and _md5(path) == md5:
        print(f"{path.name}: there already", flush=True)
        return
    part = path.with_name(f"{path.name}.part")
    _fetch_with_retries(url, path, part)
    if _md5(part) != md5:
        part.unlink()
        raise UserError(
            f"{url} is not the file that was published (its MD5 is not {md5}), "
            "and was deleted: run the command again; if it stays so, "
            f"{_advise_by_hand(path)}"
        )
    part.rename(path)


def _fetch_with_retries(url: str, path: Path, part: Path) -> None:
    """Resume a download into ``part`` until it is complete."""
    failures = 0
    while True:
        before = _size(part)
        try:
            _resume(url, part)
            return
        except urllib.error.HTTPError as error:
            # 416: the server has nothing beyond these bytes. The checksum will tell.
            if error.code == 416 and before:
                return
            reason = f"the server says {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:
                raise UserError(f"{url}: {reason}: {_advise_by_hand(path)}") from None
        except LOST as error:
            reason = one_line(error)
        failures = 0 if _size(part) > before else failures + 1
        if failures == TRIES:
            raise UserError(
                f"{url}: {reason}: what came so far is kept; "
                f"run the command again to go on, or {_advise_by_hand(path)}"
            )
        print(f"{path.name}: {reason}; trying again", flush=True)
        time.sleep(PAUSE * failures)


def _advise_by_hand(path: Path) -> str:
    return (
        f"get {path.name} elsewhere, put it into {path.parent} "
        "and run the command again"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _resume(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``.

    Raises:
        One of LOST: the connection ended before the file did.
    """
    done = _size(part)
    headers = {"Range": f"bytes={done}-"} if done else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        content_range = answer.headers.get("Content-Range", "")
        begin = content_range.removeprefix("bytes ").split("-")[0]
        if done and (answer.status != 206 or begin != str(done)):
            done = 0  # a server without ranges sends the whole file
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        last_line = time.monotonic()
        with part.open("ab" if done else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                if time.monotonic() - last_line > TELL_EVERY:
                    last_line = time.monotonic()
                    _print_progress(part, done, total)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
    _print_progress(part, done, total)


def _print_progress(part: Path, done: int, total: int | None) -> None:
    of_total = f" of {total / MB:.1f}" if total else ""
    print(f"{part.stem}: {done / MB:.1f}{of_total} MB", flush=True)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _is_unfinished(folder: Path) -> bool:
    """Tell whether an older version has left a folder while it unpacked."""
    return all(re.fullmatch(r"image_\d+\.jpg", path.name) for path in folder.iterdir())


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack ``jpg/`` whole or not at all; it replaces an unfinished one.

    The filter refuses files and links outside of the folder.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            "unpacking needs the filter that tarfile has since Python 3.11.4: "
            "take a newer Python"
        )
    print(f"unpacking {archive.name}", flush=True)
    try:
        with (
            new_folder(folder / "jpg", PICTURES, is_own=_is_unfinished) as part,
            tarfile.open(archive) as tar,
        ):
            tar.extractall(part, filter="data")
            for path in (part / "jpg").iterdir():
                path.rename(part / path.name)
            (part / "jpg").rmdir()
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} cannot be unpacked ({one_line(error)}): "
            "delete it and run the command again"
        ) from None


# ---------------------------------------------------------------- layout

FILES = ("jpg", "imagelabels.mat", "setid.mat")

# The official splits, of 1020, 1020 and 6149 images: their keys in setid.mat.
SETS = {"train": "trnid", "valid": "valid", "test": "tstid"}

# The data set itself has labels 1 to 102 and no names. These names are the ones in
# common use (``cat_to_name.json``), typing errors included.
_CLASS_NAMES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold,
tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's
foot, king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian
lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary,
red ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian,
artichoke, sweet william, carnation, garden phlox, love in the mist, mexican aster,
alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort, siam tulip,
lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue,
wallflower, marigold, buttercup, oxeye daisy, common dandelion, petunia, wild pansy,
primula, sunflower, pelargonium, bishop of llandaff, gaura, geranium, orange dahlia,
pink-yellow dahlia, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy,
gazania, azalea, water lily, rose, thorn apple, morning glory, passion flower, lotus
lotus, toad lily, anthurium, frangipani, clematis, hibiscus, columbine, desert-rose,
tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball
moss, foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket
flower, trumpet creeper, blackberry lily
"""
CLASS_NAMES = _CLASS_NAMES.replace("\n", " ").strip().split(", ")
AGAIN = "fetch them again with 'python -m vitnb download flowers-102'"


def official_splits(
    root: Path,
) -> tuple[dict[str, tuple[list[Path], list[int]]], int]:
    """Return the paths and labels of the official splits, and the number of classes.

    Images stand in the order of ``setid.mat``; labels count from 0.

    Raises:
        UserError: a part is missing or damaged, or the parts do not belong together.
    """
    for name in FILES:
        if not (root / name).exists():
            raise UserError(
                f"{root} lacks {name}, one of the three parts of Oxford Flowers-102 "
                f"({', '.join(FILES)}): {AGAIN}"
            )
    labels, ids = _read_labels(root)
    present = {path.name for path in (root / "jpg").iterdir()}
    splits = {}
    for name, numbers in ids.items():
        files = [f"image_{number:05d}.jpg" for number in numbers]
        lacking = [file for file in files if file not in present]
        if lacking:
            raise UserError(
                f"{root / 'jpg'} lacks {len(lacking)} images of the {name} split, "
                f"such as {lacking[0]}: {AGAIN}"
            )
        paths = [root / "jpg" / file for file in files]
        splits[name] = paths, [int(labels[number - 1]) - 1 for number in numbers]
    return splits, int(labels.max())


def _read_labels(root: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return every image's label, and each split's image numbers; both count from 1."""
    try:
        labels = loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]
        labels = np.atleast_1d(labels).astype(int)
        sets = loadmat(root / "setid.mat", squeeze_me=True)
        ids = {name: np.atleast_1d(sets[key]).astype(int) for name, key in SETS.items()}
    except Exception as error:  # on damaged files SciPy raises nearly everything
        raise UserError(
            f"{root}: imagelabels.mat or setid.mat is damaged "
            f"({one_line(error)}): {AGAIN}"
        ) from None
    numbers = np.concatenate(list(ids.values()))
    if not (
        _all_within(labels, len(CLASS_NAMES)) and _all_within(numbers, len(labels))
    ):
        raise UserError(
            f"{root}: imagelabels.mat and setid.mat do not belong together: {AGAIN}"
        )
    return labels, ids


def _all_within(numbers: np.ndarray, most: int) -> bool:
    """Return whether there are numbers, and all lie in 1 to ``most``."""
    return len(numbers) > 0 and numbers.min() >= 1 and numbers.max() <= most
