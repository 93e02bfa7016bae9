"""The start of a worker's interpreter, watched from a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitnb.measure import worker
from vitnb.processes import child_environment

WATCHED = """
import json, os, threading
import vitnb
from vitnb.measure import worker_main
me, seen = os.getpid(), []

class Watch:
    def find_spec(self, name, *rest):  # called before anything is imported
        if name.startswith("torch."):
            seen.append(len(os.sched_getaffinity(me)))

import sys
assert "torch" not in sys.modules, "imported before the cores are free"
sys.meta_path.insert(0, Watch())
cores = os.sched_getaffinity(0)
bound = worker_main.import_torch_on_all_cores()
free = os.sched_getaffinity(0) == cores
print(json.dumps([len(cores), len(bound), len(seen), seen.count(len(cores)), free]))
"""


def test_torch_is_imported_on_every_core():
    """OpenMP binds to one core, and yet torch's modules are imported on all of them."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: there is nothing to be bound to")
    printed = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env=child_environment(**worker.OPENMP_SETTINGS),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    cores, bound, modules, on_every_core, free = json.loads(printed)
    assert bound == 1 < cores and free
    assert modules > 100 and on_every_core == modules


def catches_interrupts(pid: int) -> bool:
    """Tell whether Python has begun in a process: it would tell of an interrupt."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if "SigCgt" in line)
    return bool(caught & 1 << signal.SIGINT - 1)


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_before_anything_is_imported_leaves_no_trace(capfd, begun):
    """A kernel that ends interrupts its processes, also one that has just begun."""
    process, pipe = worker._start_interpreter()
    end = time.monotonic() + 60
    while begun and not catches_interrupts(process.pid) and time.monotonic() < end:
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    pipe.close()
    assert capfd.readouterr().err == ""


def test_a_worker_that_nobody_asks_anything_leaves_no_trace(capfd):
    with worker.WorkerProcess(None, "fp32-sdpa") as unused:
        pass
    assert unused._process.returncode == 0
    assert capfd.readouterr().err == ""


def test_an_interrupt_while_a_worker_starts_is_not_lost(monkeypatch):
    """It is held back for an instant, and then it is an interrupt as any other."""
    started = subprocess.Popen

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return started(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker._start_interpreter()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_an_interrupted_start_leaves_no_trace_on_the_screen(capfd):
    """Ctrl-C reaches every process of a terminal, also one that imports PyTorch."""
    process, pipe = worker._start_interpreter()
    maps = Path(f"/proc/{process.pid}/maps")
    end = time.monotonic() + 60
    while "libgomp" not in maps.read_text() and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    pipe.close()
    assert capfd.readouterr().err == ""
