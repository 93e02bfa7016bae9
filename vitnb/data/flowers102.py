"""Download: a published data set, fetched so that an interrupted download goes on, checked, and put in place whole or not at all.

Oxford Flowers-102 as it is published: ``jpg/``, ``imagelabels.mat`` and ``setid.mat``.

M.-E. Nilsback, A. Zisserman, *Automated Flower Classification over a Large Number of Classes*, ICVGIP 2008.
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/
"""

import hashlib
import http.client
import shutil
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

CHUNK, TELL_EVERY = 2**20, 5.0  # bytes read at once; seconds between lines of progress


TRIES, PAUSE, TIMEOUT = 5, 2.0, 30.0  # in a row that brought nothing; seconds between them; seconds without a byte


LOST = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Source:
    """A data set: where its files lie, and the MD5 that their publisher (or, here, torchvision) gives for each."""

    url: str
    files: dict[str, str]  # name -> MD5


SOURCES = {
    "flowers-102": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        {
            "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
            "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
            "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
        },
    )
}


def download(name: str, to: Path) -> Path:
    """Fetch a data set of SOURCES into the folder ``to``, which appears once it is whole; a whole one is left as it is.

    What was fetched so far lies in ``<to>.part``, where the next call goes on. Files that were put there by hand count, if
    their checksums are right. Prints lines of progress.

    Raises UserError: an unknown name, a folder that holds something else, no connection, a wrong checksum, a full disk.
    """
    if name not in SOURCES:
        raise UserError(f"no data set '{name}' to download: {suggest(name, SOURCES)}")
    source, part = SOURCES[name], to.with_name(f"{to.name}.part")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        try:
            official_splits(to)
        except UserError as error:
            raise UserError(f"{to} is there and not whole: move it away, or name another with --to ({error})") from None
        print(f"{to} is there, and whole", flush=True)
        return to
    try:
        part.mkdir(parents=True, exist_ok=True)
        for file, md5 in source.files.items():
            fetch(source.url + file, part / file, md5)
        _unpack(part / "102flowers.tgz", part)
        official_splits(part)
        (part / "102flowers.tgz").unlink()
        if to.exists():
            to.rmdir()
        part.rename(to)
    except OSError as error:
        raise UserError(
            f"cannot write {part} ({one_line(error)}): make room or name another folder with --to"
        ) from None
    return to


def fetch(url: str, path: Path, md5: str) -> None:
    """Fetch one file; what is there already, of an earlier try, is gone on with. It gets its name once its MD5 is right.

    Tries again where the connection is lost, TRIES times in a row that bring nothing. A server that cannot go on in the middle
    sends the whole again.

    Raises UserError if it cannot be had, or is another than was published.
    """
    if path.is_file() and _md5(path) == md5:
        print(f"{path.name}: there already", flush=True)
        return
    part, failed = path.with_name(f"{path.name}.part"), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _go_on(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # nothing lies beyond what is here: the checksum will tell
                break
            if error.code < 500 and error.code != 429:
                raise UserError(f"{url}: the server says {error.code} {error.reason}: {_by_hand(path)}") from None
            reason = f"the server says {error.code} {error.reason}"
        except LOST as error:
            reason = one_line(error)
        failed = 0 if part.exists() and part.stat().st_size > before else failed + 1
        if failed == TRIES:
            raise UserError(
                f"{url}: {reason}: what came so far is kept; run the command again to go on, or {_by_hand(path)}"
            )
        print(f"{path.name}: {reason}; trying again", flush=True)
        time.sleep(PAUSE * failed)
    if _md5(part) != md5:
        part.unlink()
        raise UserError(
            f"{url} is not the file that was published (its MD5 is not {md5}), and was deleted: run the command again; "
            f"if it stays so, {_by_hand(path)}"
        )
    part.rename(path)


def _by_hand(path: Path) -> str:
    return f"get {path.name} elsewhere, put it into {path.parent} and run the command again"


def _go_on(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks; raises one of LOST if the connection ends before the file does."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        begins = answer.headers.get("Content-Range", "").removeprefix("bytes ").split("-")[0]
        if have and (answer.status != 206 or begins != str(have)):
            have = 0  # it sends the whole
        size = answer.headers.get("Content-Length")
        whole, told = have + int(size) if size else None, time.monotonic()
        with part.open("ab" if have else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                if time.monotonic() - told > TELL_EVERY:
                    told = time.monotonic()
                    _tell(part, have, whole)
    if whole is not None and have < whole:
        raise ConnectionError(f"the connection ended after {have:,} of {whole:,} bytes")
    _tell(part, have, whole)


def _tell(part: Path, have: int, whole: int | None) -> None:
    print(f"{part.stem}: {have / 2**20:.1f}" + (f" of {whole / 2**20:.1f} MB" if whole else " MB"), flush=True)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack ``jpg/``, without links out of the folder or owners from elsewhere; what an earlier try left is removed."""
    shutil.rmtree(folder / "jpg", ignore_errors=True)
    print(f"unpacking {archive.name}", flush=True)
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} cannot be unpacked ({one_line(error)}): delete it and run the command again"
        ) from None


FILES = ("jpg", "imagelabels.mat", "setid.mat")


SETS = {"train": "trnid", "valid": "valid", "test": "tstid"}  # the official 1020, 1020 and 6149 images


# Label 1 to 102. The labels themselves are numbers; these are the names that go round with them (``cat_to_name.json``), typing
# errors included.
_CLASS_NAMES = """
pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird
of paradise, monkshood, globe thistle, snapdragon, colt's foot, king protea, spear thistle, yellow iris, globe-flower,
purple coneflower, peruvian lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke, sweet william, carnation,
garden phlox, love in the mist, mexican aster, alpine sea holly, ruby-lipped cattleya, cape flower, great masterwort,
siam tulip, lenten rose, barbeton daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold,
buttercup, oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop of llandaff,
gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese anemone, black-eyed susan, silverbush,
californian poppy, osteospermum, spring crocus, bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose,
thorn apple, morning glory, passion flower, lotus lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily, hippeastrum, bee balm, ball moss,
foxglove, bougainvillea, camellia, mallow, mexican petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
"""


CLASS_NAMES = _CLASS_NAMES.replace("\n", " ").strip().split(", ")


def official_splits(root: Path) -> tuple[dict[str, tuple[list[Path], list[int]]], int]:
    """Images and labels (from 0) of the official splits, in the order of ``setid.mat``, and the number of classes.

    Raises UserError if a part is missing or damaged, or the parts do not belong together.
    """
    again = "fetch them again with 'python -m vitnb download flowers-102'"
    for name in FILES:
        if not (root / name).exists():
            raise UserError(
                f"{root} lacks {name}, one of the three parts of Oxford Flowers-102 ({', '.join(FILES)}): {again}"
            )
    try:
        labels = np.atleast_1d(loadmat(root / "imagelabels.mat", squeeze_me=True)["labels"]).astype(int)
        sets = loadmat(root / "setid.mat", squeeze_me=True)
        ids = {name: np.atleast_1d(sets[key]).astype(int) for name, key in SETS.items()}
    except Exception as error:  # whatever scipy stumbles over
        raise UserError(f"{root}: imagelabels.mat or setid.mat is damaged ({one_line(error)}): {again}") from None
    named = np.concatenate(list(ids.values()))
    if not len(labels) or labels.min() < 1 or labels.max() > len(CLASS_NAMES) or named.min() < 1 or named.max() > len(labels):
        raise UserError(f"{root}: imagelabels.mat and setid.mat do not belong together: {again}")
    there, found = {path.name for path in (root / "jpg").iterdir()}, {}
    for name, numbers in ids.items():
        files = [f"image_{number:05d}.jpg" for number in numbers]
        lacking = [file for file in files if file not in there]
        if lacking:
            raise UserError(
                f"{root / 'jpg'} lacks {len(lacking)} images of the {name} split, such as {lacking[0]}: {again}"
            )
        found[name] = [root / "jpg" / file for file in files], [int(labels[number - 1]) - 1 for number in numbers]
    return found, int(labels.max())
