"""Engines: ways to launch a forward. All of them give the model's logits.

- ``eager``: operator by operator, as the source study ran everything. At small batches
  the GPU waits for Python.
- ``graph``: a CUDA graph for each batch size. All launches are recorded once and then
  replayed together.
- ``compile``: torch.compile in its mode reduce-overhead, which fuses operators and uses
  CUDA graphs as well.
- ``fused``: the rearranged forward of ``fused.vit``, replayed as a CUDA graph.

An engine that cannot run an input shape falls back for this shape alone. What ran
stands in the record by batch size, under its own name and with the reason:

- ``eager`` for a graph or a compiled model that cannot be had;
- ``compile, in pieces`` where Python runs between compiled parts;
- ``compile, without a graph`` where torch.compile leaves CUDA graphs out;
- ``fused, without a graph`` for a fused forward that cannot be captured;
- ``fused, in PyTorch's operators`` where there is no Triton.
"""

import time
from collections.abc import Callable

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from transformers.modeling_outputs import ImageClassifierOutput

from vitnb.errors import VariantError, one_line

# Forwards before a capture: libraries choose their kernels and allocate in the first.
WARM_UP = 3

REASON_LENGTH = 120  # characters of a library's message that a reason keeps

# Versions of one function that torch.compile may keep, and those of all models
# together. By default it keeps 8 and runs a ninth shape eagerly, without a word. A
# model that is compiled in pieces keeps a version for each shape of every piece.
RECOMPILE_LIMIT = 1024
ACCUMULATED_LIMIT = 64 * RECOMPILE_LIMIT


class Engine:
    """Launch a model operator by operator.

    Args:
        name: what runs, unless the engine falls back.
        model: the model to launch.
        reason: why ``name`` is not the engine that was asked for; empty if it is.
        fallback: what runs where the engine falls back.

    Attributes:
        seconds: the time to capture or compile, by batch size (as text, for JSON).
    """

    captures = False  # whether forwards are recorded or compiled before they run

    def __init__(
        self, name: str, model: nn.Module, reason: str = "", fallback: str = "eager"
    ):
        self.name = name
        self.model = model
        self.reason = reason
        self.fallback = fallback
        self.seconds: dict[str, float] = {}
        # Input shape -> what runs it, and why this is not what was asked for.
        self._ran: dict[torch.Size, tuple[str, str]] = {}
        self._fell_back: set[torch.Size] = set()

    def __call__(self, pixel_values: torch.Tensor, **options):
        """Return the model's output for pixels [batch, 3, height, width]."""
        if pixel_values.shape not in self._ran:
            self._keep(pixel_values.shape)
        return self.model(pixel_values=pixel_values, **options)

    def replays(self, shape: torch.Size) -> bool:
        """Tell whether forwards of an input shape skip the model's own calls.

        Hooks then see nothing.
        """
        return self.captures and shape not in self._fell_back

    def ran(self, shape: torch.Size) -> tuple[str, str]:
        """Return what runs an input shape, and why it is not what was asked for.

        The reason is empty if it is. The shape must have had a forward.
        """
        return self._ran[shape]

    def reset(self) -> None:
        """Forget all input shapes, with what was captured or compiled for them."""
        self._ran.clear()
        self._fell_back.clear()
        self.seconds.clear()

    def _keep(self, shape: torch.Size, more: str = "", reason: str = "") -> None:
        """Keep that the engine runs a shape.

        Args:
            more: what the engine's name lacks, such as ``in pieces``.
            reason: why.
        """
        names = [self.name, more]
        reasons = [self.reason, reason]
        self._ran[shape] = ", ".join(filter(None, names)), _join(reasons)

    def fall_back(self, shape: torch.Size, reason: str) -> None:
        """Launch an input shape as ``fallback`` says from now on."""
        self._ran[shape] = self.fallback, _join([self.reason, reason])
        self._fell_back.add(shape)

    def as_record(self) -> dict[str, object]:
        """Return the entries of a record, by batch size (as text).

        Of two input shapes of one batch size, the one that fell back is told.
        """
        ran, reasons = {}, {}
        for shape in sorted(self._ran, key=lambda it: (it[0], it in self._fell_back)):
            size = str(shape[0])
            ran[size], reasons[size] = self._ran[shape]
        return {
            "engine_ran": ran,
            "engine_reason": {size: text for size, text in reasons.items() if text},
            "engine_seconds": self.seconds,
        }


def _join(reasons: list[str]) -> str:
    return "; ".join(filter(None, reasons))


class Graph(Engine):
    """Replay a CUDA graph for each input shape.

    Each graph reads an input buffer that stays in its place. All graphs share one pool
    of memory.
    """

    captures = True

    def __init__(
        self, name: str, model: nn.Module, reason: str = "", fallback: str = "eager"
    ):
        super().__init__(name, model, reason, fallback)
        # Input shape -> (input buffer, graph, its logits).
        self.graphs: dict[torch.Size, tuple] = {}
        self.pool = None

    def reset(self) -> None:
        """Forget all input shapes, and free their graphs."""
        super().reset()
        self.graphs.clear()
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
        shape = pixel_values.shape
        if shape not in self._ran:
            try:
                self._capture(pixel_values)
                self._keep(shape)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # An operator that waits for the device cannot be captured.
                reason = f"no CUDA graph: {one_line(error)[:REASON_LENGTH]}"
                self.fall_back(shape, reason)
        if shape in self._fell_back:
            return self.model(pixel_values=pixel_values)
        buffer, graph, logits = self.graphs[shape]
        buffer.copy_(pixel_values)
        graph.replay()
        # Cloned, because the next replay overwrites them.
        return ImageClassifierOutput(logits=logits.clone())


def raise_recompile_limits() -> None:
    """Let torch.compile compile every shape of this process, or fail.

    The limits are not set around each call, because that would be timed.
    """
    config = torch._dynamo.config
    config.recompile_limit = RECOMPILE_LIMIT
    config.accumulated_recompile_limit = ACCUMULATED_LIMIT
    config.fail_on_recompile_limit_hit = True


def compile_whole(model: nn.Module, mode: str) -> Callable:
    """Compile a model for each input shape, in one piece or not at all."""
    raise_recompile_limits()
    return torch.compile(model, mode=mode, dynamic=False, fullgraph=True)


def count_graphs_left_out() -> int:
    """Return how often torch.compile has left out a CUDA graph in this process."""
    return counters["inductor"]["cudagraph_skips"]


class Compiled(Engine):
    """Launch a model through torch.compile, compiled once for each input shape."""

    captures = True

    def __init__(self, name: str, model: nn.Module):
        super().__init__(name, model)
        on_gpu = next(model.parameters()).is_cuda
        mode = "reduce-overhead" if on_gpu else "default"
        self.whole = compile_whole(model, mode)
        # Python runs between the pieces, as bitsandbytes' outliers need it.
        self.pieces = torch.compile(model, mode=mode, dynamic=False)
        # Input shape -> one of the two.
        self.compiled: dict[torch.Size, Callable] = {}

    def reset(self) -> None:
        """Forget all input shapes, and free what this process has compiled."""
        super().reset()
        self.compiled.clear()
        torch.compiler.reset()

    def _run(self, compiled: Callable, pixels: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        # Cloned, because the CUDA graphs of torch.compile overwrite their results.
        return compiled(pixel_values=pixels).logits.clone()

    def _compile(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Compile for the shape of these pixels, in pieces if need be; or fall back.

        Returns the logits of the first forward; None if the engine fell back.
        """
        begin = time.perf_counter()
        left_out, broken = count_graphs_left_out(), ""
        for compiled in (self.whole, self.pieces):
            try:
                logits = self._run(compiled, pixels)
                if logits.is_cuda:
                    # The next forwards record its CUDA graphs and replay them.
                    for _ in range(WARM_UP - 1):
                        logits = self._run(compiled, pixels)
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler may raise anything
                broken = f"torch.compile: {_describe_failure(error)}"
                continue
            more = ["in pieces"] if broken else []
            if count_graphs_left_out() > left_out:
                more.append("without a graph")
                broken = _join([broken, "torch.compile left out a CUDA graph"])
            self.seconds[str(len(pixels))] = round(time.perf_counter() - begin, 3)
            self.compiled[pixels.shape] = compiled
            self._keep(pixels.shape, ", ".join(more), broken)
            return logits
        self.fall_back(pixels.shape, broken)
        return None

    def __call__(self, pixel_values: torch.Tensor):
        """Return the logits of pixels [batch, 3, height, width]."""
        shape = pixel_values.shape
        if shape in self.compiled:
            # What fails now has run before. It raises: the times before are its own.
            logits = self._run(self.compiled[shape], pixel_values)
        elif shape not in self._fell_back:
            logits = self._compile(pixel_values)
        if shape in self._fell_back:
            return self.model(pixel_values=pixel_values)
        return ImageClassifierOutput(logits=logits)


def _describe_failure(error: Exception) -> str:
    """Return a compiler's error in one line."""
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return f"more than {RECOMPILE_LIMIT} input shapes or other recompilations"
    return one_line(error)[:REASON_LENGTH]


def make_engine(name: str, model: nn.Module, on: torch.device) -> Engine:
    """Return an engine for a model on a device.

    Args:
        name: one of ``variants.ENGINES``; see the top of this module.
        model: the model to launch; for ``fused`` a ``FusedViT``.
        on: the model's device.
    """
    if name == "compile":
        return Compiled(name, model)
    if name == "fused":
        return _make_fused(model, on)
    if name == "graph" and on.type == "cuda":
        return Graph(name, model)
    if name == "graph":
        return Engine("eager", model, "no CUDA graph: they need an NVIDIA GPU")
    return Engine(name, model)


def _make_fused(model: nn.Module, on: torch.device) -> Engine:
    """Return the engine of a ``FusedViT``, under the name of what it computes with."""
    if on.type == "cuda":
        fallback = f"{model.ran}, without a graph"
        return Graph(model.ran, model, model.reason, fallback)
    # Its CUDA graphs need a GPU as its kernels do. One reason names both.
    return Engine(model.ran, model, model.reason)


def check_finite(logits: torch.Tensor) -> torch.Tensor:
    """Return logits [images, classes] as they are.

    Raises VariantError if some are not finite: such images have no prediction, and no
    divergence.
    """
    broken = (~logits.isfinite()).any(-1).sum().item()
    if broken:
        raise VariantError(
            f"the logits of {broken} of {len(logits)} images are not finite: "
            "take a variant with a wider number format, such as fp32 or bf16"
        )
    return logits
