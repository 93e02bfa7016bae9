"""The switchboard: one loaded model whose Linears change, in place, between 16 bits and their quantized twins.

Every Linear gets a twin for each width; a configuration is a choice of widths, and no model is loaded twice. What several
configurations share with one *base*, the blocks before the first Linear that differs from it, is computed once.
"""

import hashlib
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.errors import UserError, VariantError
from vitnb.measure import accuracy
from vitnb.models import layers, quantization
from vitnb.models.layers import transformer_blocks
from vitnb.models.loader import LoadedVariant

BATCH_SIZE = 128


PLAIN = 16  # bits of a Linear that is not quantized


@dataclass
class ReferenceAnswers:
    """What every configuration answers: the images of one split, and what the full-precision model says of them.

    pixels: batches of float32 [batch, 3, height, width]; labels: int64 [images], or none; reference: float64 [images, classes];
    digest: SHA-256 of pixels and labels.
    """

    pixels: list[torch.Tensor]
    labels: torch.Tensor
    reference: torch.Tensor
    digest: str

    def scores(self, logits: torch.Tensor) -> dict:
        """top1 (None without labels), kl (mean, nats), and raw by image: predicted and kl_by_image."""
        divergence, predicted = accuracy.kl_divergence(self.reference, logits), logits.argmax(-1)
        return {
            "top1": (predicted == self.labels).double().mean().item() if len(self.labels) else None,
            "kl": divergence.mean().item(),
            "predicted": predicted.tolist(),
            "kl_by_image": accuracy.round_significant(divergence),
        }


def compute_logits(loaded: LoadedVariant, pixels: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """float64 [images, classes] on the CPU, from batches of float32 [batch, 3, height, width]."""
    with loaded.inference() as model:
        return torch.cat([model(pixel_values=batch.to(loaded.device, dtype)).logits.double().cpu() for batch in pixels])


def reference_answers(loaded: LoadedVariant, split: Split) -> ReferenceAnswers:
    """Read a split and let the model answer it as it was loaded, in full precision: before there is a Switchboard."""
    pixels = [batch for batch, _ in dataset.make_batches(dataset.PixelDataset(split, loaded.processor), BATCH_SIZE)]
    digest = hashlib.sha256(str(split.labels).encode())
    for batch in pixels:
        digest.update(batch.contiguous().numpy())
    return ReferenceAnswers(pixels, torch.tensor(split.labels), compute_logits(loaded, pixels, loaded.dtype), digest.hexdigest())


class SwitchableModel:
    """A model, changed to the 16-bit type ``dtype``, with a twin of every Linear but the head in each of ``bits`` (4, 8)."""

    def __init__(self, model: nn.Module, bits: Iterable[int], dtype: torch.dtype):
        # Exports hold 16-bit weights, whatever is computed in.
        rounded = model.to(devices.half_dtype(model.device))
        self.model, self.dtype = rounded.to(dtype), dtype
        self.plain = layers.quantizable(model)
        self.twins = {PLAIN: self.plain} | {
            width: {name: quantization.quantized_copy(module, width, dtype) for name, module in self.plain.items()}
            for width in bits
        }

    def switch(self, widths: dict[str, int], rest: int) -> tuple[int, int]:
        """Give the Linears in ``widths`` (full name to bits) theirs, all others ``rest``; (quantized, kept) as counted.

        Raises UserError for a Linear that is not there, VariantError if the model does not end up as asked.
        """
        if unknown := widths.keys() - self.plain.keys():
            raise UserError(f"'{min(unknown)}' changes nothing: no Linear that can be quantized has this name")
        wanted = {name: widths.get(name, rest) for name in self.plain}
        for name, width in wanted.items():
            self.model.set_submodule(name, self.twins[width][name])
        counted, quantized = quantization.count_linears(self.model), sum(width != PLAIN for width in wanted.values())
        if counted != (quantized, len(wanted) + 1 - quantized):
            raise VariantError(f"{quantized} Linears were to be quantized, but {counted[0]} are")
        return counted

    def names(self, prefixes: Iterable[str]) -> list[str]:
        """Full names of the Linears under some prefixes; UserError for one that matches none."""
        return [name for name in quantization.modules_to_skip(self.model, prefixes) if name in self.plain]

    def restore(self) -> nn.Module:
        """The model with no Linear quantized."""
        self.switch({}, PLAIN)
        return self.model

    def held_bytes(self, bits: int) -> dict[str, int]:
        """Bytes of each Linear at a width, with its bias and quantization state; see ``quantize.resident_bytes``."""
        return {name: quantization.resident_bytes(module) for name, module in self.twins[bits].items()}


class _Recorded(nn.Module):
    """Stands in for a block that need not be computed: gives again what the block gave, batch by batch."""

    def __init__(self, outputs: list):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, *_, **__):
        return next(self.outputs)


class CachedEvaluator:
    """Answers of a model under many choices of widths, most of which differ little from one base width.

    The first question keeps the base's output of every block, for all images, on the model's device; the others begin at the
    first block that has a Linear of another width. Computed with the same weights, the blocks before would give the same.
    ``replay=False``: keep nothing and compute all blocks, for choices that differ from the base nearly from the start.
    """

    def __init__(self, board: SwitchableModel, loaded: LoadedVariant, images: ReferenceAnswers, base: int, replay: bool = True):
        self.board, self.loaded, self.images, self.base, self.replay = board, loaded, images, base, replay
        self.blocks = transformer_blocks(board.model)
        self.outputs: dict[str, list] = {}  # of every block, batch by batch

    def ask(self, widths: dict[str, int]) -> dict:
        """linears_quantized and linears_kept as counted, and ``Images.scores``, of the base but for ``widths``."""
        if self.replay and not self.outputs:
            self.board.switch({}, self.base)
            with self._recorded():
                self._logits()
        quantized, kept = self.board.switch(widths, self.base)
        changed = [name for name, width in widths.items() if width != self.base]
        with self._replayed(self._before(changed)):
            scores = self.images.scores(self._logits())
        return {"linears_quantized": quantized, "linears_kept": kept} | scores

    def _logits(self) -> torch.Tensor:
        return compute_logits(self.loaded, self.images.pixels, self.board.dtype)

    def _before(self, changed: list[str]) -> list[str]:
        """The blocks before the first that holds one of the changed Linears; all of them if none is changed."""
        first = (i for i, block in enumerate(self.blocks) if any(name.startswith(f"{block}.") for name in changed))
        inside = all(any(name.startswith(f"{block}.") for block in self.blocks) for name in changed)
        return self.blocks[: next(first, len(self.blocks))] if inside and self.replay else []

    @contextmanager
    def _recorded(self):
        """Keep the outputs of every block, batch by batch."""
        hooks = []
        for name in self.blocks:
            self.outputs[name] = kept = []
            hook = self.board.model.get_submodule(name).register_forward_hook(
                lambda _m, _i, out, kept=kept: kept.append(out)
            )
            hooks.append(hook)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _replayed(self, blocks: list[str]):
        """Replace the first blocks by what they gave under the base."""
        model = self.board.model
        real = {name: model.get_submodule(name) for name in blocks}
        for name in blocks:
            model.set_submodule(name, _Recorded(self.outputs[name]))
        try:
            yield
        finally:
            for name, module in real.items():
                model.set_submodule(name, module)
