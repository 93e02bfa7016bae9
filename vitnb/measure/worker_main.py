"""Start the interpreter of a worker process, on every core until its variant is loaded.

The OpenMP runtime binds the first thread of a process to the first core as soon as it
is loaded, and the import of PyTorch begins with it. Without a remedy, the processes of
a comparison would all import on that one core, one after the other.
"""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path


def load_openmp() -> None:
    """Load the OpenMP runtime of PyTorch's wheels alone, if there is one."""
    for folder in find_spec("torch").submodule_search_locations:
        for path in Path(folder, "lib").glob("libgomp*"):
            ctypes.CDLL(str(path))


def load_torch() -> None:
    """Import PyTorch, which brings an OpenMP runtime from elsewhere if it has to."""
    import_module("torch")


def import_torch_on_all_cores() -> set[int]:
    """Import PyTorch on all cores; return those that OpenMP bound this thread to."""
    cores = bound = os.sched_getaffinity(0)
    for load in (load_openmp, load_torch):
        load()
        if (now := os.sched_getaffinity(0)) != cores:
            bound = now
            os.sched_setaffinity(0, cores)
    return bound


def fork_servers(descriptors: list[int], serve: Callable[[Connection], None]) -> None:
    """Serve each pipe in a process of its own, and wait until all of them have ended.

    The processes are forked before anything was computed: no thread is lost.
    """
    # Python 3.12 warns of a fork beside threads. Those of NumPy's BLAS have nothing to
    # do yet, and it starts them anew in a child.
    warnings.simplefilter("ignore", DeprecationWarning)
    children = []
    for descriptor in descriptors:
        child = os.fork()
        if child == 0:
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            try:
                serve(Connection(descriptor))
            finally:
                os._exit(0)
        children.append(child)
    for descriptor in descriptors:
        os.close(descriptor)
    for child in children:
        os.waitpid(child, 0)


def main(descriptors: list[int]) -> None:
    """Serve the pipes that this interpreter has inherited, see ``worker.serve``."""
    # Ctrl-C ends a worker at once, without a trace of its own on the screen. It was
    # held back until here, where Python would still have told of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    bound = import_torch_on_all_cores()
    from vitnb.measure import worker  # late: the module imports PyTorch

    if len(descriptors) == 1:
        worker.serve(Connection(descriptors[0]), bound)
    else:
        fork_servers(descriptors, lambda pipe: worker.serve(pipe, bound))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
