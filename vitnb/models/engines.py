"""Engines: how a forward is launched. Each is called like the model and gives the same logits.

- ``eager``: operator by operator, as the source study ran everything. At small batches the GPU waits for Python.
- ``graph``: a CUDA graph for each batch size: the launches are recorded once and replayed together.
- ``compile``: torch.compile in its mode reduce-overhead, which fuses operators and uses CUDA graphs as well.
- ``fused``: the forward rearranged, see ``fused.vit``, and replayed as a CUDA graph.

An engine that cannot be had falls back to launching operator by operator, and says why.
"""

import time

import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitnb.errors import one_line

WARM_UP = 3  # forwards before a capture: libraries choose their kernels and allocate in the first ones


class Engine:
    """A model as it is launched.

    ran: the engine that really runs; reason: why it is not the one that was asked for; seconds: what getting ready took, by
    batch size.
    """

    captures = False  # whether a forward is recorded or compiled before it is launched

    def __init__(self, asked: str, model: nn.Module):
        self.model, self.ran, self.reason, self.seconds = model, asked, "", {}

    def __call__(self, pixel_values: torch.Tensor, **options):
        return self.model(pixel_values=pixel_values, **options)

    @property
    def replays(self) -> bool:
        """Whether the forward is no longer made of the model's own calls, so that hooks on its modules see nothing."""
        return self.captures and not self.reason

    def fall_back(self, reason: str) -> None:
        """Launch operator by operator from now on."""
        self.ran, self.reason = "eager", reason

    def as_record(self) -> dict[str, object]:
        """What a record keeps."""
        return {"engine_ran": self.ran, "engine_reason": self.reason, "engine_seconds": self.seconds}


class Graph(Engine):
    """A CUDA graph for each shape of input, with an input buffer that stays where it is; all share one pool of memory."""

    captures = True

    def __init__(self, asked: str, model: nn.Module):
        super().__init__(asked, model)
        self.graphs: dict[torch.Size, tuple] = {}
        self.pool = None

    def _capture(self, pixels: torch.Tensor) -> None:
        begin = time.perf_counter()
        static, beside = pixels.clone(), torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.model(pixel_values=static)
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.model(pixel_values=static).logits
        self.pool = graph.pool()
        self.graphs[pixels.shape] = static, graph, logits
        self.seconds[str(len(pixels))] = round(time.perf_counter() - begin, 3)

    def __call__(self, pixel_values: torch.Tensor):
        if self.reason:
            return super().__call__(pixel_values)
        if pixel_values.shape not in self.graphs:
            try:
                self._capture(pixel_values)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what waits for the device cannot be captured
                self.fall_back(f"no CUDA graph: {one_line(error)[:120]}")
                return super().__call__(pixel_values)
        static, graph, logits = self.graphs[pixel_values.shape]
        static.copy_(pixel_values)
        graph.replay()
        return ImageClassifierOutput(logits=logits.clone())  # the next replay overwrites its own


class Compiled(Engine):
    """torch.compile, once for each shape; its CUDA graphs overwrite their results, so the logits are copied."""

    captures = True

    def __init__(self, asked: str, model: nn.Module):
        super().__init__(asked, model)
        mode = "reduce-overhead" if next(model.parameters()).is_cuda else "default"
        self.compiled = torch.compile(model, mode=mode, dynamic=False)

    def __call__(self, pixel_values: torch.Tensor):
        if self.reason:
            return super().__call__(pixel_values)
        torch.compiler.cudagraph_mark_step_begin()
        size, begin = str(len(pixel_values)), time.perf_counter()
        try:
            logits = self.compiled(pixel_values=pixel_values).logits.clone()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler may raise
            self.fall_back(f"torch.compile: {one_line(error)[:120]}")
            return super().__call__(pixel_values)
        if size not in self.seconds:
            if logits.is_cuda:
                torch.cuda.synchronize()
            self.seconds[size] = round(time.perf_counter() - begin, 3)
        return ImageClassifierOutput(logits=logits)


def make_engine(asked: str, model: nn.Module, on: torch.device) -> Engine:
    """The engine ``asked`` (see the top) for a model on a device; ``fused`` wants a FusedViT."""
    if asked == "compile":
        return Compiled(asked, model)
    if asked in ("graph", "fused") and on.type == "cuda":
        return Graph(asked, model)
    engine = Engine(asked, model)
    if asked == "graph":
        engine.fall_back("no CUDA graph: they need an NVIDIA GPU")
    return engine
