"""Child processes: the environment that every one of them gets."""

import os
import sys

from vitnb.study import ROOT


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment of a child process that imports the same ``vitnb``.

    The package need not be installed: ``PYTHONPATH`` begins with the repository, and
    holds what this process can import.

    Args:
        more: further variables. What the user has set already wins.
    """
    path = dict.fromkeys([str(ROOT), *filter(None, sys.path)])
    return more | os.environ | {"PYTHONPATH": os.pathsep.join(path)}
