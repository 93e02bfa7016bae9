"""TODO."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of ``final`` at the end: whole, or not at all if anything is raised."""
    final.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield part
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a killed writer, never leaves half of it behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an array (npy, no pickles) whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_file(path, buffer.getvalue())


MB = 2**20  # megabytes are 2^20 bytes everywhere, as in the source study
