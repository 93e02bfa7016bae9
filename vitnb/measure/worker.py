"""Workers: fresh processes that each hold one variant or peer and answer one question at a time.

A process of its own keeps what one variant allocates, compiles or caches away from the next one's numbers.
"""

import math
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np
import torch

from vitnb import devices, variants
from vitnb.data import dataset
from vitnb.data.splits import load_split
from vitnb.errors import UserError, VariantError, one_line
from vitnb.measure import latency, memory
from vitnb.models import loader
from vitnb.study import ROOT, Study

# Each thread keeps its core: where the scheduler moves them, one process can be slower than its twin for seconds on end.
SETTINGS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


# The uncounted forwards of a block last at least this long: another process had the caches, and a GPU that waited for its turn
# has slowed its clocks down.
LEAD_MS = 5.0


class VariantServer:
    """What runs in a worker: one loaded variant, and the questions that can be asked of it."""

    def __init__(self, study: Study, variant: str, device: str | None = None):
        on, self.cores = devices.select_device(device), os.sched_getaffinity(0)
        self.before = memory.driver_bytes(on)
        self.loaded = loader.load_variant(study, variants.parse(variant), on=on)
        self.split = load_split(study, "test")
        self.pixels: dict[int, torch.Tensor] = {}
        self.first: dict[int, float] = {}  # by batch size: seconds of the first forward
        self.lead: dict[int, int] = {}  # by batch size: uncounted forwards at the beginning of a block

    def _batch(self, size: int) -> torch.Tensor:
        if size not in self.pixels:
            self.pixels[size] = self.loaded.prepare(dataset.first_batch(self.split, self.loaded.processor, size))
        return self.pixels[size]

    def describe(self) -> dict:
        """What was loaded; see ``Loaded.found``."""
        return self.loaded.as_record()

    def prepare(self, batch_size: int) -> None:
        """The first forward at a batch size, which may compile: on every core, as a compiler's processes inherit them."""
        if batch_size in self.first:
            return
        mine, begin = os.sched_getaffinity(0), time.perf_counter()
        os.sched_setaffinity(0, self.cores)
        try:
            with self.loaded.inference() as model:
                latency.time_host(self.loaded, model, self._batch(batch_size))
        finally:
            os.sched_setaffinity(0, mine)
        self.first[batch_size] = time.perf_counter() - begin

    def warm_up(self, batch_size: int) -> dict:
        """Forwards until the time is stable, or for a second: the turns that follow do not depend on it. See ``latency.warm_up``.

        Also first_seconds, the first forward at this batch size, what is compiled or captured for it included (beside other
        processes that do the same); and which engine runs now.
        """
        self.prepare(batch_size)
        pixels = self._batch(batch_size)
        with self.loaded.inference() as model:
            found = latency.warm_up(lambda: latency.time_host(self.loaded, model, pixels), limit=1.0)
            typical = np.median([latency.time_host(self.loaded, model, pixels) for _ in range(latency.WINDOW_FORWARDS)])
        self.lead[batch_size] = math.ceil(LEAD_MS / typical)
        engine = self.loaded.engine
        return found | {
            "first_seconds": round(self.first[batch_size], 3),
            "engine_ran": engine.ran,
            "engine_reason": engine.reason,
        }

    def block(self, batch_size: int, forwards: int) -> list[float]:
        """Milliseconds of some forwards in a row, after some that are not counted: one, or as many as last LEAD_MS."""
        pixels, lead = self._batch(batch_size), self.lead.get(batch_size, 1)
        with self.loaded.inference() as model:
            return latency.time_device(self.loaded, model, pixels, lead + forwards)[lead:]

    def memory(self, batch_sizes: list[int]) -> list[dict]:
        """Peaks of memory at each batch size, smallest first, as a peak never falls; see ``memory.peaks``."""
        return [memory.peak_memory(self.loaded, self._batch(size), self.before) for size in sorted(batch_sizes)]


def serve(pipe: Connection, bound: set[int]) -> None:
    """Answer questions until the pipe closes, on the cores ``bound`` once the variant is loaded.

    A user's error goes back as what it is, any other in one line.
    """
    for name in SETTINGS:  # the OpenMP runtime here has read them; that of a process which a compiler starts must not
        os.environ.pop(name, None)
    asked, held = None, None
    while True:
        try:
            asked = asked or pipe.recv()  # first of all, which bench, of what
            name, options = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if held is None:
                bench, arguments = asked
                held = bench(*arguments)
                os.sched_setaffinity(0, bound)
            answer = (None, getattr(held, name)(**options))
        except (UserError, VariantError) as error:
            answer = (type(error), one_line(error))
        except torch.OutOfMemoryError as error:
            answer = (VariantError, f"out of memory: lower batch_size ({one_line(error)[:80]})")
        except Exception as error:
            answer = (VariantError, f"{type(error).__name__}: {one_line(error)}")
        pipe.send(answer)


def _start() -> tuple[subprocess.Popen, Connection]:
    """A new interpreter, not a fork: a fork would inherit what this process has allocated and started."""
    ours, theirs = socket.socketpair()
    with theirs:
        python_path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        process = subprocess.Popen(
            [sys.executable, "-m", "vitnb.measure.worker_main", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=SETTINGS | os.environ | {"PYTHONPATH": python_path},
            stdout=subprocess.DEVNULL,
        )
    return process, Connection(ours.detach())


_ahead: list[tuple[subprocess.Popen, Connection]] = []


def prewarm() -> None:
    """Start the interpreter of the next ``Worker`` now: its imports take seconds, in which this process does something else."""
    if not _ahead:
        _ahead.append(_start())


class WorkerProcess:
    """A variant in a process of its own. ``with Worker(study, "nf4-sdpa") as worker: worker.ask("warm_up", batch_size=1)``.

    ``bench``: what runs there, ``Bench`` or something like it that can be imported.
    """

    def __init__(self, study: Study, variant: str, device: str | None = None, bench: type = VariantServer):
        self.variant = variant
        self._process, self._pipe = _ahead.pop() if _ahead else _start()
        self._pipe.send((bench, (study, variant, device)))

    def send(self, name: str, **options) -> None:
        """Ask without waiting for the answer; ``receive`` takes it."""
        try:
            self._pipe.send((name, options))
        except BrokenPipeError:
            self._died()

    def _died(self) -> NoReturn:
        raise VariantError(
            f"the process of {self.variant} died (exit code {self._process.wait()}), most likely out of memory: "
            "lower batch_size, or close other programs"
        ) from None

    def receive(self):
        """The answer to the last question. Raises what it raised there; VariantError if the process died."""
        try:
            error, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._died()
        if error:
            raise error(answer)
        return answer

    def ask(self, name: str, **options):
        """Call the method ``name`` of the bench there and return what it returns."""
        self.send(name, **options)
        return self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()
        self._process.wait()


def measure_memory(study, variant: str, batch_sizes: list[int], device: str | None = None) -> list[dict[str, int]]:
    """``peaks`` of one variant at each batch size, in a fresh process of its own: nothing else is in the numbers."""
    with WorkerProcess(study, variant, device) as worker:
        return worker.ask("memory", batch_sizes=batch_sizes)
