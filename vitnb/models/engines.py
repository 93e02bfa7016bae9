"""Engines: ways to launch a forward. All of them give the model's logits.

- ``eager``: operator by operator, as the source study ran everything. At small batches
  the GPU waits for Python.
- ``graph``: a CUDA graph for each batch size. All launches are recorded once and then
  replayed together.
- ``compile``: torch.compile in its mode reduce-overhead, which fuses operators and uses
  CUDA graphs as well.
- ``fused``: the rearranged forward of ``fused.vit``, replayed as a CUDA graph.

An engine that cannot run here falls back to eager and keeps the reason.
"""

import time

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitnb.errors import one_line

# Forwards before a capture: libraries choose their kernels and allocate in the first.
WARM_UP = 3

REASON_LENGTH = 120  # characters of a library's message that a reason keeps


class Engine:
    """Launch a model operator by operator.

    Attributes:
        model: the model to launch.
        ran: the name of the engine that really runs.
        fell_back: whether that is ``eager`` in the place of another engine.
        reason: why it fell back, for a record; empty if it did not.
        seconds: the time to capture or compile, by batch size (as text, for JSON).
    """

    captures = False  # whether forwards are recorded or compiled before they run

    def __init__(self, name: str, model: nn.Module):
        self.model = model
        self.ran = name
        self.fell_back = False
        self.reason = ""
        self.seconds: dict[str, float] = {}

    def __call__(self, pixel_values: torch.Tensor, **options):
        """Return the model's output for pixels [batch, 3, height, width]."""
        return self.model(pixel_values=pixel_values, **options)

    @property
    def replays(self) -> bool:
        """Whether forwards skip the model's own calls, so that hooks see nothing."""
        return self.captures and not self.fell_back

    def fall_back(self, reason: str) -> None:
        """Launch operator by operator from now on."""
        self.ran = "eager"
        self.fell_back = True
        self.reason = reason

    def as_record(self) -> dict[str, object]:
        """Return the entries of a record."""
        return {
            "engine_ran": self.ran,
            "engine_reason": self.reason,
            "engine_seconds": self.seconds,
        }


class Graph(Engine):
    """Replay a CUDA graph for each input shape.

    Each graph reads an input buffer that stays in its place. All graphs share one pool
    of memory.
    """

    captures = True

    def __init__(self, name: str, model: nn.Module):
        super().__init__(name, model)
        # Input shape -> (input buffer, graph, its logits).
        self.graphs: dict[torch.Size, tuple] = {}
        self.pool = None

    def _capture(self, pixels: torch.Tensor) -> None:
        """Record a graph for the shape of these pixels."""
        begin = time.perf_counter()
        buffer = pixels.clone()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                self.model(pixel_values=buffer)
        torch.cuda.current_stream().wait_stream(side_stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.model(pixel_values=buffer).logits
        self.pool = graph.pool()
        self.graphs[pixels.shape] = (buffer, graph, logits)
        self.seconds[str(len(pixels))] = round(time.perf_counter() - begin, 3)

    def __call__(self, pixel_values: torch.Tensor):
        """Return the logits of pixels [batch, 3, height, width]."""
        if self.fell_back:
            return super().__call__(pixel_values)
        if pixel_values.shape not in self.graphs:
            try:
                self._capture(pixel_values)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # An operator that waits for the device cannot be captured.
                self.fall_back(f"no CUDA graph: {one_line(error)[:REASON_LENGTH]}")
                return super().__call__(pixel_values)
        buffer, graph, logits = self.graphs[pixel_values.shape]
        buffer.copy_(pixel_values)
        graph.replay()
        # Cloned, because the next replay overwrites them.
        return ImageClassifierOutput(logits=logits.clone())


class Compiled(Engine):
    """Launch a model through torch.compile, compiled once for each input shape."""

    captures = True

    def __init__(self, name: str, model: nn.Module):
        super().__init__(name, model)
        on_gpu = next(model.parameters()).is_cuda
        mode = "reduce-overhead" if on_gpu else "default"
        self.compiled = torch.compile(model, mode=mode, dynamic=False)

    def __call__(self, pixel_values: torch.Tensor):
        """Return the logits of pixels [batch, 3, height, width]."""
        if self.fell_back:
            return super().__call__(pixel_values)
        torch.compiler.cudagraph_mark_step_begin()
        begin = time.perf_counter()
        try:
            # Cloned, because the CUDA graphs of torch.compile overwrite their results.
            logits = self.compiled(pixel_values=pixel_values).logits.clone()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything
            self.fall_back(f"torch.compile: {one_line(error)[:REASON_LENGTH]}")
            return super().__call__(pixel_values)
        size = str(len(pixel_values))
        if size not in self.seconds:
            if logits.is_cuda:
                torch.cuda.synchronize()
            self.seconds[size] = round(time.perf_counter() - begin, 3)
        return ImageClassifierOutput(logits=logits)


def make_engine(name: str, model: nn.Module, on: torch.device) -> Engine:
    """Return an engine for a model on a device.

    Args:
        name: one of ``variants.ENGINES``; see the top of this module.
        model: the model to launch; for ``fused`` a ``FusedViT``.
        on: the model's device.
    """
    if name == "compile":
        return Compiled(name, model)
    if name in ("graph", "fused") and on.type == "cuda":
        return Graph(name, model)
    engine = Engine(name, model)
    if name == "graph":
        engine.fall_back("no CUDA graph: they need an NVIDIA GPU")
    return engine
