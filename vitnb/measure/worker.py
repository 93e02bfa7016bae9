"""Time one variant in this process, or in a process of its own.

A ``LocalVariant`` runs in the process that made it. A ``WorkerProcess`` has the same
methods and passes each call to a LocalVariant in a fresh process. There, no other
variant allocates, compiles or caches.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np
import torch

from vitnb import devices, variants
from vitnb.data import dataset
from vitnb.data.splits import Split, load_split
from vitnb.errors import VariantError, as_known_error, one_line
from vitnb.measure import latency, memory
from vitnb.models import engines, loader
from vitnb.processes import child_environment
from vitnb.study import Study

# Each thread keeps its core. Where the scheduler moves threads, one process can be
# slower than its twin for seconds on end.
OPENMP_SETTINGS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}

# The uncounted forwards of a block last at least this long. Another process had the
# caches, and a GPU that waited for its turn has slowed its clocks down.
LEAD_MS = 5.0

WARMUP_LIMIT_SECONDS = 1.0  # before interleaved blocks, which do not depend on more


class LocalVariant:
    """A loaded variant whose forwards are timed in this process.

    Args:
        split: where the images come from.
        pixels: {batch size: pixels ready on the device}; missing sizes are read from
            the split when they are needed.
        bytes_before: ``memory.driver_bytes`` before the variant was loaded.
    """

    def __init__(
        self,
        loaded: loader.LoadedVariant,
        split: Split,
        pixels: dict[int, torch.Tensor] | None = None,
        bytes_before: int = 0,
    ):
        self.loaded = loaded
        self.split = split
        self.pixels = pixels or {}
        self.bytes_before = bytes_before
        self.cores = os.sched_getaffinity(0)
        self.first_seconds: dict[int, float] = {}  # of the first forward, by batch size
        self.lead: dict[int, int] = {}  # uncounted forwards of a block, by batch size

    def batch(self, size: int) -> torch.Tensor:
        """Return ``size`` images, ready on the device."""
        if size not in self.pixels:
            images = dataset.first_batch(self.split, self.loaded.processor, size)
            self.pixels[size] = self.loaded.prepare(images)
        return self.pixels[size]

    def describe(self) -> dict:
        """Describe the loaded variant, see ``LoadedVariant.as_record``."""
        return self.loaded.as_record()

    def first_forward(self, batch_size: int) -> None:
        """Run the first forward at a batch size, which may compile, on every core.

        A compiler's processes inherit the cores of the process that starts them.

        Raises:
            VariantError: the logits at this batch size are not finite.
        """
        if batch_size in self.first_seconds:
            return
        pixels = self.batch(batch_size)
        bound, begin = os.sched_getaffinity(0), time.perf_counter()
        os.sched_setaffinity(0, self.cores)
        try:
            with self.loaded.inference() as model:
                latency.time_host(self.loaded, model, pixels)
                seconds = time.perf_counter() - begin
                # One more, because a graph gives its own logits from now on.
                output = model(pixel_values=pixels)
                logits = getattr(output, "logits", output)
                engines.check_finite(logits.float().cpu())
        finally:
            os.sched_setaffinity(0, bound)
        self.first_seconds[batch_size] = seconds

    def warm_up(self, batch_size: int) -> dict:
        """Run forwards until their time is stable, but not much longer than a second.

        Returns:
            forwards, seconds, stable: see ``latency.warm_up``.
            first_seconds: the first forward at this batch size, compilation and capture
                included. Other processes may do the same at that time.
            engine_ran, engine_reason: what runs this batch size, and why it is not
                what was asked for; see ``Engine.ran``.
        """
        self.first_forward(batch_size)
        pixels = self.batch(batch_size)
        with self.loaded.inference() as model:

            def forward() -> float:
                return latency.time_host(self.loaded, model, pixels)

            warmed = latency.warm_up(forward, WARMUP_LIMIT_SECONDS)
            typical = np.median([forward() for _ in range(latency.WINDOW_FORWARDS)])
        self.lead[batch_size] = math.ceil(LEAD_MS / typical)
        ran, reason = self.loaded.engine.ran(pixels.shape)
        return warmed | {
            "first_seconds": round(self.first_seconds[batch_size], 3),
            "engine_ran": ran,
            "engine_reason": reason,
        }

    def time_block(self, batch_size: int, forwards: int) -> list[float]:
        """Time some forwards in a row, in milliseconds each.

        Uncounted forwards go ahead: one, or after a warm-up as many as last LEAD_MS.
        """
        pixels, lead = self.batch(batch_size), self.lead.get(batch_size, 1)
        with self.loaded.inference() as model:
            times = latency.time_device(self.loaded, model, pixels, lead + forwards)
        return times[lead:]

    def measure_memory(self, batch_sizes: list[int]) -> list[dict[str, int]]:
        """Measure the peaks of memory at each batch size, see ``memory.peak_memory``.

        Returns:
            A row for each batch size, in the order asked. The smallest is measured
            first, as a CPU's peak never falls.
        """
        peaks = {}
        for size in sorted(set(batch_sizes)):
            self.pixels.clear()  # those of other batch sizes would count
            pixels = self.batch(size)
            peaks[size] = memory.peak_memory(self.loaded, pixels, self.bytes_before)
        return [peaks[size] for size in batch_sizes]


def load_local_variant(
    study: Study, name: str, device: str | None = None
) -> LocalVariant:
    """Load a variant of a study, with images of the test split to time it with."""
    on = devices.select_device(device)
    bytes_before = memory.driver_bytes(on)
    loaded = loader.load_variant(study, variants.parse(name), on=on)
    split = load_split(study, "test")
    return LocalVariant(loaded, split, bytes_before=bytes_before)


def serve(pipe: Connection, bound_cores: set[int]) -> None:
    """Answer calls until the pipe closes.

    The first message is (function, arguments): how to load the object to serve. Every
    later message is (method, options), and is answered by (error type, value). An
    error's value is its message in one line, see ``as_known_error``.

    Args:
        bound_cores: the cores to run on once the object is loaded.
    """
    # The OpenMP runtime has read them. The processes that a compiler starts must not.
    for name in OPENMP_SETTINGS:
        os.environ.pop(name, None)
    served = None
    with suppress(
        EOFError, BrokenPipeError, ConnectionResetError
    ):  # the other end left
        load, arguments = pipe.recv()
        while True:
            method, options = pipe.recv()
            try:
                if served is None:
                    served = load(*arguments)
                    os.sched_setaffinity(0, bound_cores)
                answer = (None, getattr(served, method)(**options))
            except Exception as error:
                known = as_known_error(error)
                answer = (type(known), one_line(known))
            pipe.send(answer)


def _start_interpreter() -> tuple[subprocess.Popen, Connection]:
    """Start a worker's interpreter, and return its process and our end of the pipe.

    A fork would inherit memory and threads of this process; a new interpreter does not.
    """
    process, (pipe,) = start_interpreter(1)
    return process, pipe


def start_interpreter(servers: int) -> tuple[subprocess.Popen, list[Connection]]:
    """Start an interpreter, and return its process and our ends of the pipes.

    With several servers, the interpreter imports once and forks a process for each. On
    two cores the imports of a comparison would else take minutes. Only a CPU's servers
    can be made so: CUDA does not survive a fork.
    """
    pairs = [socket.socketpair() for _ in range(servers)]
    descriptors = [theirs.fileno() for _, theirs in pairs]
    with ExitStack() as stack, _interrupts_held_back():
        for _, theirs in pairs:
            stack.enter_context(theirs)
        process = subprocess.Popen(
            [sys.executable, "-m", "vitnb.measure.worker_main", *map(str, descriptors)],
            pass_fds=descriptors,
            env=child_environment(**OPENMP_SETTINGS),
            stdout=subprocess.DEVNULL,
        )
    return process, [Connection(ours.detach()) for ours, _ in pairs]


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Hold back Ctrl-C for this thread, and for a process that it starts.

    The process lets it through once it can end without a trace on the screen, see
    ``worker_main.main``. This thread gets it behind the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_prewarmed: list[tuple[subprocess.Popen, Connection]] = []


def prewarm() -> None:
    """Start the interpreter of the next WorkerProcess now.

    Its imports take seconds, in which this process can do something else.
    """
    if not _prewarmed:
        _prewarmed.append(_start_interpreter())


class WorkerProcess:
    """A variant in a process of its own, with the methods of a LocalVariant.

    Example:
        with WorkerProcess(study, "nf4-sdpa") as worker:
            worker.warm_up(batch_size=1)

    Args:
        load: makes the object that the process serves, from (study, name, device). It
            must be importable by name.
        pipe: to a process of ``start_interpreter``, which whoever started it ends; None
            to start one.
    """

    def __init__(
        self,
        study: Study,
        name: str,
        device: str | None = None,
        load: Callable = load_local_variant,
        pipe: Connection | None = None,
    ):
        self.name = name
        self._process, self._pipe = None, pipe
        if pipe is None:
            self._process, self._pipe = (
                _prewarmed.pop() if _prewarmed else _start_interpreter()
            )
        with suppress(BrokenPipeError):  # the first call says that the process died
            self._pipe.send((load, (study, name, device)))

    def send(self, method: str, **options) -> None:
        """Call a method in the process without waiting; ``receive`` takes the answer.

        Raises:
            VariantError: the process died.
        """
        try:
            self._pipe.send((method, options))
        except BrokenPipeError:
            self._raise_died()

    def receive(self):
        """Return the answer to the last call.

        Raises:
            UserError, VariantError: the error of the call, or the process died.
        """
        try:
            error, answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._raise_died()
        if error:
            raise error(answer)
        return answer

    def call(self, method: str, **options):
        """Call a method in the process, and return its answer."""
        self.send(method, **options)
        return self.receive()

    def warm_up(self, batch_size: int) -> dict:
        """Run forwards until their time is stable, see ``LocalVariant.warm_up``."""
        return self.call("warm_up", batch_size=batch_size)

    def time_block(self, batch_size: int, forwards: int) -> list[float]:
        """Time some forwards in a row, see ``LocalVariant.time_block``."""
        return self.call("time_block", batch_size=batch_size, forwards=forwards)

    def measure_memory(self, batch_sizes: list[int]) -> list[dict[str, int]]:
        """Measure the peaks of memory, see ``LocalVariant.measure_memory``."""
        return self.call("measure_memory", batch_sizes=batch_sizes)

    def _raise_died(self) -> NoReturn:
        code = f" (exit code {self._process.wait()})" if self._process else ""
        raise VariantError(
            f"the process of {self.name} died{code}, "
            "most likely out of memory: lower batch_size, or close other programs"
        ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()
        if self._process:
            self._process.wait()


def measure_memory(
    study: Study, name: str, batch_sizes: list[int], device: str | None = None
) -> list[dict[str, int]]:
    """Measure the peaks of a variant's memory at each batch size, in a fresh process.

    Returns:
        A row for each batch size, in the order asked, see ``memory.peak_memory``.
    """
    with WorkerProcess(study, name, device) as worker:
        return worker.measure_memory(batch_sizes)
