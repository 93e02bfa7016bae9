"""The start of a worker's interpreter, watched from a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from vitnb.measure import worker
from vitnb.study import ROOT

WATCHED = """
import json, os, threading
import vitnb
from vitnb import fresh
me, seen, over = os.getpid(), [], threading.Event()

class Watch:
    def find_spec(self, name, *rest):  # asked before anything is imported
        if name.startswith("torch."):
            seen.append(len(os.sched_getaffinity(me)))

import sys
sys.meta_path.insert(0, Watch())
cores = os.sched_getaffinity(0)
bound = fresh.unbound()
print(json.dumps([len(cores), len(bound), len(seen), seen.count(len(cores)), os.sched_getaffinity(0) == cores]))
"""


def test_torch_is_imported_on_every_core():
    """OpenMP binds to one core when it is told to, and all but the first modules of torch are imported on all of them."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: there is nothing to be bound to")
    environment = worker.SETTINGS | os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, "-c", WATCHED], env=environment, capture_output=True, text=True, check=True)
    cores, bound, modules, on_every_core, free = json.loads(told.stdout)
    assert bound == 1 < cores and free
    assert modules > 100 and on_every_core == modules
