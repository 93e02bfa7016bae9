"""Fresh: how the interpreter of a worker starts, free to use every core until its variant is loaded.

The OpenMP runtime binds the first thread of every process to the first core as soon as it is loaded, and PyTorch loads it at the
beginning of its import. Left there, the processes of a comparison would import one after the other, on that one core.
"""

import ctypes
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

from vitnb.measure import worker


def load_openmp() -> None:
    """Load the OpenMP runtime that PyTorch's wheels bring, without the rest of PyTorch; where there is none, do nothing."""
    for folder in find_spec("torch").submodule_search_locations:
        for path in Path(folder, "lib").glob("libgomp*"):
            ctypes.CDLL(str(path))


def unbound() -> set[int]:
    """Import PyTorch on all the cores that this process has, and return those that OpenMP binds its first thread to."""
    cores = bound = os.sched_getaffinity(0)
    for load in (load_openmp, lambda: import_module("torch")):  # an OpenMP from elsewhere comes with the second
        load()
        if (now := os.sched_getaffinity(0)) != cores:
            bound = now
            os.sched_setaffinity(0, cores)
    return bound


def main(descriptor: int) -> None:
    """Serve the pipe that this interpreter inherited; see ``workers.serve``."""
    bound = unbound()

    worker.serve(Connection(descriptor), bound)


if __name__ == "__main__":
    main(int(sys.argv[1]))
