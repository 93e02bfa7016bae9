"""Write files, arrays and folders whole or not at all.

A reader never sees half of a file, and a killed writer leaves the old one in place.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MB = 2**20  # bytes of a megabyte, as in the source study


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Give a new folder to write in, which replaces ``final`` at the end.

    If anything is raised, ``final`` stays as before and the new folder is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield part
        part.chmod(0o755)  # mkdtemp makes folders for their owner alone
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array as .npy, without pickles, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_file(path, buffer.getvalue())
