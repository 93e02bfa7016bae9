"""Download: a published data set, fetched so that an interrupted download goes on, checked, and put in place whole or not at all."""

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

from vitnb import oxford
from vitnb.errors import UserError, nearest, one_line

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


def get(name: str, to: Path) -> Path:
    """Fetch a data set of SOURCES into the folder ``to``, which appears once it is whole; a whole one is left as it is.

    What was fetched so far lies in ``<to>.part``, where the next call goes on. Files that were put there by hand count, if
    their checksums are right. Prints lines of progress.

    Raises UserError: an unknown name, a folder that holds something else, no connection, a wrong checksum, a full disk.
    """
    if name not in SOURCES:
        raise UserError(f"no data set '{name}' to download: {nearest(name, SOURCES)}")
    source, part = SOURCES[name], to.with_name(f"{to.name}.part")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        try:
            oxford.splits(to)
        except UserError as error:
            raise UserError(f"{to} is there and not whole: move it away, or name another with --to ({error})") from None
        print(f"{to} is there, and whole", flush=True)
        return to
    try:
        part.mkdir(parents=True, exist_ok=True)
        for file, md5 in source.files.items():
            fetch(source.url + file, part / file, md5)
        _unpack(part / "102flowers.tgz", part)
        oxford.splits(part)
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
