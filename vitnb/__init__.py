"""vitnb measures quantization and attention kernels on a Vision Transformer.

Data moves one way: study (YAML) -> notebook -> record (JSON) -> report (HTML). Records
are the wall: ``measure``, ``models`` and ``training`` make them, ``analysis``,
``figures`` and ``report`` read them, without PyTorch.
"""

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"

# The OpenMP runtime reads these two when torch is imported. By default its threads spin
# for milliseconds after each operator, and single forwards on a shared machine take
# seconds. Threads that sleep at once would make a small model wait for their waking. So
# they spin for some ten microseconds and then sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# The profiler announces every start and stop on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Progress bars of the libraries end up as carriage returns in stored notebooks.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# bitsandbytes warns of a cast in every int8 forward; a record holds the dtype instead.
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _close_hub() -> None:
    """Let no library fetch anything by itself, in this process and in its children.

    ``models.checkpoints.fetch_base`` alone reaches the hub, for a base that a study
    names. A user who has closed the hub keeps it closed for bases, too.
    """
    closed = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
    if str(closed).upper() not in ("1", "ON", "YES", "TRUE"):  # what the hub reads
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ[BASES_FROM_HUB] = "1"
    # The hub's library reads the variable once, when it is imported.
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_OFFLINE = True
    # This package fetches compiled code from the hub. Where it is installed,
    # bitsandbytes computes NF4 with such code on CPUs with AVX512-BF16, and
    # transformers takes it for flash-attn. None makes its import fail.
    sys.modules.setdefault("kernels", None)
    os.environ["USE_HUB_KERNELS"] = "NO"


BASES_FROM_HUB = "VITNB_BASES_FROM_HUB"  # set where the hub is closed by this package
_close_hub()


def _keep_memory() -> None:
    """Let the C library keep freed memory, where it is Linux's.

    By default it hands memory back to the system after every operator. Large
    activations are then mapped and cleared anew in each forward, in some processes and
    not in others, by the luck of where the heap ends: two processes of one variant
    differed by a fifth.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


_keep_memory()


def lazy_modules(room: str) -> Callable[[str], ModuleType]:
    """Return a module ``__getattr__`` that imports a room's modules at first use.

    A notebook then says ``measure.latency.time_batch_sizes``, and loads no module that
    it does not use (PEP 562).
    """

    def get(name: str) -> ModuleType:
        if name.startswith("_") or find_spec(f"{room}.{name}") is None:
            raise AttributeError(f"module '{room}' has no attribute '{name}'")
        return import_module(f"{room}.{name}")

    return get
