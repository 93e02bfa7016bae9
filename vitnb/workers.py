"""Workers: fresh processes that each hold one variant and answer one question at a time.

A process of its own keeps what one variant allocates, compiles or caches away from the next one's numbers.
"""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import NoReturn

import torch

from vitnb import data, latency, memory, models, studies, variants
from vitnb.errors import UserError, VariantError, one_line

# Each thread keeps its core: where the scheduler moves them, one process can be slower than its twin for seconds on end.
SETTINGS = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
# The OpenMP runtime binds the first thread of every process to the first core as soon as torch is imported. Until the variant is
# loaded it is set free, or all processes would load on that one core.
START = (
    "import os, vitnb; cores = os.sched_getaffinity(0); import torch; bound = os.sched_getaffinity(0); "
    "os.sched_setaffinity(0, cores); from vitnb import workers; workers.main({pipe}, bound)"
)


class Bench:
    """What runs in a worker: one loaded variant, and the questions that can be asked of it."""

    def __init__(self, study: studies.Study, variant: str, device: str | None = None):
        on = models.device(device)
        self.before = memory.in_use(on)
        self.loaded = models.load(study, variants.get(variant), on=on)
        self.split = data.split(study, "test")
        self.pixels: dict[int, torch.Tensor] = {}

    def _batch(self, size: int) -> torch.Tensor:
        if size not in self.pixels:
            self.pixels[size] = self.loaded.to_input(data.first_batch(self.split, self.loaded.processor, size))
        return self.pixels[size]

    def describe(self) -> dict:
        """What was loaded; see ``Loaded.found``."""
        return self.loaded.found()

    def warm_up(self, batch_size: int) -> dict:
        """Forwards until the time is stable, or for a second: the turns that follow do not depend on it. See ``latency.warm_up``."""
        pixels = self._batch(batch_size)
        with self.loaded.running() as model:
            return latency.warm_up(lambda: latency.on_host(self.loaded, model, pixels), limit=1.0)

    def block(self, batch_size: int, forwards: int) -> list[float]:
        """Milliseconds of some forwards in a row, after one that is not counted: another process had the caches."""
        pixels = self._batch(batch_size)
        with self.loaded.running() as model:
            return latency.on_device(self.loaded, model, pixels, forwards + 1)[1:]

    def memory(self, batch_sizes: list[int]) -> list[dict]:
        """Peaks of memory at each batch size, smallest first, as a peak never falls; see ``memory.peaks``."""
        return [memory.peaks(self.loaded, self._batch(size), self.before) for size in sorted(batch_sizes)]


def serve(pipe: Connection, bound: set[int]) -> None:
    """Answer questions until the pipe closes, on the cores ``bound`` once the variant is loaded.

    A user's error goes back as what it is, any other in one line.
    """
    bench, arguments = pipe.recv()
    held = None
    while True:
        try:
            name, options = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if held is None:
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


class Worker:
    """A variant in a process of its own. ``with Worker(study, "nf4-sdpa") as worker: worker.ask("warm_up", batch_size=1)``.

    ``bench``: what runs there, ``Bench`` or something like it that can be imported.
    """

    def __init__(self, study: studies.Study, variant: str, device: str | None = None, bench: type = Bench):
        self.variant = variant
        ours, theirs = socket.socketpair()
        with theirs:
            # A new interpreter, not a fork: a fork would inherit what this process has allocated and started.
            command = START.format(pipe=theirs.fileno())
            python_path = os.pathsep.join([str(studies.ROOT), *filter(None, sys.path)])
            self._process = subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()],
                env=SETTINGS | os.environ | {"PYTHONPATH": python_path},
                stdout=subprocess.DEVNULL,
            )
        self._pipe = Connection(ours.detach())
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


def main(descriptor: int, bound: set[int]) -> None:
    """What the new interpreter runs: serve the pipe that it inherited."""
    serve(Connection(descriptor), bound)
