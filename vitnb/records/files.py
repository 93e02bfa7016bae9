"""Write files, arrays and folders whole or not at all.

A reader never sees half of a file, and a killed writer leaves the old one in place. A
folder is replaced only if this package wrote it.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitnb.errors import NO_ROOM, UserError, describe_write_error

if TYPE_CHECKING:
    import pandas as pd

MB = 2**20  # bytes of a megabyte, as in the source study

MARKER = ".vitnb"  # a file in each folder that may be replaced; it says what it holds
ASIDE = ".vitnb-old"  # ends the name of an old folder for a moment
REPLACED = "replaced"  # in the marker of an old folder that is being deleted

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@contextmanager
def new_folder(
    final: Path,
    what: str,
    *,
    reads: Iterable[Path] = (),
    is_own: Callable[[Path], bool] | None = None,
    keep: Path | None = None,
) -> Iterator[Path]:
    """Give a new folder to write in, which replaces ``final`` at the end.

    If anything is raised, ``final`` stays as before and the new folder is removed. The
    old one is set aside, and deleted once the new one is in its place. If the process
    is killed in between, the next call puts the old one back.

    Args:
        what: names the content, such as ``checkpoints``. It stands in a marker in the
            folder, by which a later call knows that it may be replaced.
        reads: folders that the content is made from.
        is_own: tells whether a folder without a marker was written by a version of
            this package that wrote none; None: no folder was.
        keep: the folder to move the old one into; None: the old one is deleted.

    Raises:
        UserError: see ``check_new_folder``, or the folder cannot be written.
    """
    check_new_folder(final, what, reads=reads, is_own=is_own)
    path = _real(final)
    missing = [parent for parent in path.parents if not parent.exists()]
    with _explain_write(final):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        try:
            yield part
        except OSError as error:
            if error.errno in NO_ROOM:
                raise UserError(describe_write_error(error, final)) from None
            raise
        with _explain_write(final):
            _write_marker(part, what)
            part.chmod(0o755)  # mkdtemp makes folders for their owner alone
            _require_own(path, what, is_own)  # the work may have taken hours
            _replace(path, part, what, keep)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in missing:  # if nothing was put there
            with suppress(OSError):
                parent.rmdir()


def check_new_folder(
    final: Path,
    what: str,
    *,
    reads: Iterable[Path] = (),
    is_own: Callable[[Path], bool] | None = None,
) -> None:
    """Check that ``new_folder`` may replace a folder, and can write beside it.

    Long work calls this before it begins. See ``new_folder`` for the arguments.

    Raises:
        UserError: the folder is not empty and not this package's own; it is one of
            ``reads``, lies in one or holds one; or it cannot be written.
    """
    path = _real(final)
    for source in map(_real, reads):
        if path.is_relative_to(source) or source.is_relative_to(path):
            raise UserError(
                f"{final} cannot be replaced: {what} are made from {source}, "
                "and one lies in the other: name another folder"
            )
    there = next(parent for parent in path.parents if os.path.lexists(parent))
    with _explain_write(final):
        _finish_replacement(path)
        _require_own(path, what, is_own)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=there):
            pass  # it can be written


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _require_own(folder: Path, what: str, is_own: Callable | None) -> None:
    """Raise UserError for what may not be replaced."""
    if not os.path.lexists(folder) or _read_marker(folder) == what:
        return
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        if not names:
            return
        # A marker of something else says that it is something else.
        if is_own and MARKER not in names and is_own(folder):
            return
        found = next((name for name in names if name != MARKER), MARKER)
    else:
        found = "a file"
    raise UserError(
        f"{folder} holds what was not written as {what} ({found}): "
        "move it away, or name another folder"
    )


def _set_aside(folder: Path) -> Path:
    """Return where the old folder waits until the new one is in its place."""
    return folder.with_name(f".{folder.name}{ASIDE}")


def _replace(folder: Path, part: Path, what: str, keep: Path | None) -> None:
    """Put a new folder in the place of the old one, and keep or delete the old one."""
    if not folder.is_dir() or not any(folder.iterdir()):
        part.rename(folder)  # also onto an empty folder
        return
    old = _set_aside(folder)
    _write_marker(folder, what, keep)  # an older version wrote none
    folder.rename(old)
    try:
        part.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _put_away(old)


def _finish_replacement(folder: Path) -> None:
    """Finish what a killed process has begun.

    The old folder is put back if the new one is not in its place, and deleted if it is.
    """
    old = _set_aside(folder)
    if not old.is_dir():
        return
    marker = _read_marker(old)
    if marker is None:
        raise UserError(f"{old} is in the way: move it away")
    if marker == REPLACED or _read_marker(folder) == marker:
        _put_away(old)
    elif not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        old.rename(folder)


def _put_away(old: Path) -> None:
    """Move an old folder to where its marker says that it is kept, or delete it."""
    if keep := _marker_fields(old).get("keep"):
        Path(keep).mkdir(parents=True, exist_ok=True)
        name = old.name.removeprefix(".").removesuffix(ASIDE)
        old.rename(Path(keep) / name)
        return
    with suppress(UserError):  # a full disk: the next call deletes it all the same
        _write_marker(old, REPLACED)
    _delete(old)


def _delete(folder: Path) -> None:
    """Delete a folder, its marker last: what is left of it stays known as its own."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARKER:
            with suppress(OSError):
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _write_marker(folder: Path, what: str, keep: Path | None = None) -> None:
    fields = {"what": what, "by": "vitnb"} | ({"keep": str(keep)} if keep else {})
    write_file(folder / MARKER, json.dumps(fields) + "\n")


def _marker_fields(folder: Path) -> dict[str, str]:
    """Return the fields of a folder's marker; none if it has no marker of ours."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(marker, dict) and marker.get("by") == "vitnb"
    return marker if known else {}


def _read_marker(folder: Path) -> str | None:
    """Return what a folder of this package holds; None if its marker is missing."""
    return _marker_fields(folder).get("what")


@contextmanager
def _explain_write(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a UserError in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(describe_write_error(error, path)) from None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; its folder is made if it is missing.

    Raises UserError if it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with _explain_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink()


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array as .npy, without pickles, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_file(path, buffer.getvalue())


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """Write a table as CSV, without its index, whole or not at all.

    A spreadsheet runs a text that begins like a formula. Such a text gets an apostrophe
    in front, see ``escape_formula``.
    """
    import pandas as pd  # late: lists of images do without

    table = table.rename(columns=escape_formula)
    for i, kind in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            table.isetitem(i, table.iloc[:, i].map(escape_formula))
    # A lone carriage return would end a row unless it is quoted.
    bare = any("\r" in str(cell) for cell in table.to_numpy().flat)
    quoting = csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL
    text = table.to_csv(index=False, lineterminator="\n", quoting=quoting)
    write_file(path, text)


def escape_formula(cell: object) -> object:
    """Return a cell that no spreadsheet takes for a formula.

    A text that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break gets an
    apostrophe in front. Numbers stay as they are, also where they are text.
    """
    if not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def digest_files(paths: Iterable[Path], *more: object) -> str:
    """Return the SHA-256 of the bytes of files, in order, and of further values.

    Args:
        more: values that JSON can hold, such as labels.

    Raises OSError for a file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(more).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def array_digest(values: np.ndarray) -> str:
    """Return the SHA-256 of an array's numbers."""
    return hashlib.sha256(np.ascontiguousarray(values)).hexdigest()
