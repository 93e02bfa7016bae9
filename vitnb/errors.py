"""Errors that a user can make, each told in one line that names the fix."""

import difflib
from collections.abc import Iterable


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


def as_known_error(error: Exception) -> UserError | VariantError:
    """Return an error as a UserError or a VariantError, in one line.

    Whatever a library raises while one variant runs fails that variant alone. Running
    out of memory has a fix of its own. It is known by its name, so that this module
    does without PyTorch.
    """
    if isinstance(error, (UserError, VariantError)):
        return error
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return VariantError(
            "out of memory: lower batch_size, or take an nf4 variant "
            f"({one_line(error)[:80]})"
        )
    return VariantError(f"{type(error).__name__}: {one_line(error)}")
