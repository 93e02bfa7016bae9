"""Errors that a user can make, each told in one line that names the fix."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input is wrong and the message says how to put it right. Nothing was written."""


class VariantError(Exception):
    """A variant cannot run here, or did not run what its name says. Its row stays in the table with this reason."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a mistyped name: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for tables and terminals."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
