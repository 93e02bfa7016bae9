"""Errors that a user can make, each told in one line that names the fix."""

import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of a disk that takes no more, whatever is being written.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Errors of a place that cannot be written to, and what helps.
WRITE_FIXES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "make room",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOTDIR: "move away what is in its place",
    errno.EEXIST: "move away what is in its place",
    errno.EISDIR: "move away what is in its place",
    errno.ENOTEMPTY: "move away what is in its place",
}


class UserError(Exception):
    """The input is wrong, and the message says how to put it right.

    Nothing was written.
    """


class VariantError(Exception):
    """A variant cannot run here, or did not run what its name says.

    Its row stays in the table with this reason.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose one of: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, for tables and terminals."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_write_error(error: OSError, path: Path | None = None) -> str:
    """Return one line that says what cannot be written, why, and what helps.

    Args:
        path: what was being written; None for the file that the error names.
    """
    reason = error.strerror or one_line(error)
    fix = WRITE_FIXES.get(error.errno, "make it writable")
    return (
        f"cannot write {path or error.filename or 'the results'}: {reason}: {fix}, "
        "or name another folder (VITNB_OUTPUTS, --to or --out)"
    )


def describe_file_error(error: OSError) -> str:
    """Return one line for a file that cannot be written or opened.

    It is empty for an error that is of no file, such as one of a library.
    """
    if error.errno is None or not (error.filename or error.errno in NO_ROOM):
        return ""
    unreadable = (
        error.errno in (errno.EACCES, errno.EPERM)
        and os.path.exists(error.filename)
        and not os.access(error.filename, os.R_OK)
    )
    if error.errno in WRITE_FIXES and not unreadable:
        return describe_write_error(error)
    return f"cannot open {error.filename}: {error.strerror}: see that it can be read"


def as_known_error(error: Exception) -> UserError | VariantError:
    """Return an error as a UserError or a VariantError, in one line.

    Whatever a library raises while one variant runs fails that variant alone. Running
    out of memory has a fix of its own. It is known by its name, so that this module
    does without PyTorch.
    """
    if isinstance(error, (UserError, VariantError)):
        return error
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return UserError(describe_write_error(error))
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return VariantError(
            "out of memory: lower batch_size, or take an nf4 variant "
            f"({one_line(error)[:80]})"
        )
    return VariantError(f"{type(error).__name__}: {one_line(error)}")


@contextmanager
def raise_known_errors() -> Iterator[None]:
    """Raise whatever a library raises in a block as ``as_known_error`` says.

    A block, or a function that this decorates, is where one variant is loaded or run. A
    user's own mistake outside of it keeps its trace.
    """
    try:
        yield
    except Exception as error:
        known = as_known_error(error)
        if known is error:
            raise
        raise known from error
