"""A switchable model: Linears that change in place between 16, 8 and 4 bits.

Every Linear gets one quantized copy for each width. A configuration is a choice of
widths, and no model is loaded twice. Most configurations differ from one *base* width
in few Linears. The blocks before the first changed Linear are then computed once.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vitnb import devices
from vitnb.data import dataset
from vitnb.data.splits import Split
from vitnb.errors import UserError, VariantError
from vitnb.measure import accuracy
from vitnb.models import engines, layers, nf4, quantization
from vitnb.models.loader import LoadedVariant

BATCH_SIZE = 128
UNQUANTIZED = 16  # bits of a Linear that is not quantized


@dataclass
class ReferenceAnswers:
    """Images of one split with the answers of the full-precision model.

    pixels: batches of float32 [batch, 3, height, width].
    labels: int64 [images], empty for a split without labels.
    reference: logits of the full-precision model, float64 [images, classes].
    digest: SHA-256 of pixels and labels.
    """

    pixels: list[torch.Tensor]
    labels: torch.Tensor
    reference: torch.Tensor
    digest: str

    def scores(self, logits: torch.Tensor) -> dict:
        """Compare logits [images, classes] with the labels and the reference.

        Returns:
            top1 (None without labels), kl (mean, nats), and for each image predicted
            and kl_by_image.
        """
        divergence = accuracy.kl_divergence(self.reference, logits)
        predicted = logits.argmax(-1)
        top1 = None
        if len(self.labels):
            top1 = (predicted == self.labels).double().mean().item()
        return {
            "top1": top1,
            "kl": divergence.mean().item(),
            "predicted": predicted.tolist(),
            "kl_by_image": accuracy.round_significant(divergence),
        }


def compute_logits(
    loaded: LoadedVariant, pixels: list[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Return the logits of all images, float64 [images, classes] on the CPU.

    Args:
        loaded: the variant; its model computes in ``dtype``.
        pixels: batches of float32 [batch, 3, height, width].
        dtype: type of the model's weights and inputs.

    Raises:
        VariantError: logits are not finite.
    """
    logits = []
    with loaded.inference() as model:
        for batch in pixels:
            inputs = batch.to(loaded.device, dtype)
            logits.append(model(pixel_values=inputs).logits.double().cpu())
    return engines.check_finite(torch.cat(logits))


def reference_answers(loaded: LoadedVariant, split: Split) -> ReferenceAnswers:
    """Read a split and compute the full-precision answers.

    Call this before the model becomes a ``SwitchableModel``, which rounds its weights.
    """
    images = dataset.PixelDataset(split, loaded.processor)
    pixels = [batch for batch, _ in dataset.make_batches(images, BATCH_SIZE)]
    digest = hashlib.sha256(str(split.labels).encode())
    for batch in pixels:
        digest.update(batch.contiguous().numpy())
    logits = compute_logits(loaded, pixels, loaded.dtype)
    labels = torch.tensor(split.labels)
    return ReferenceAnswers(pixels, labels, logits, digest.hexdigest())


class SwitchableModel:
    """A model whose Linears, all but the head, switch between several widths.

    The model is changed in place. Its weights are first rounded to the 16-bit type,
    because exported checkpoints hold 16-bit weights. Then it computes in ``dtype``.
    Answers and bytes are those of the exported variants, bit for bit.

    Args:
        model: the full-precision model.
        bits: widths besides 16 bits, of 4 and 8.
        dtype: compute type, see ``devices.compute_dtype``.
    """

    def __init__(self, model: nn.Module, bits: Iterable[int], dtype: torch.dtype):
        self.model = model.to(devices.half_dtype(model.device)).to(dtype)
        self.dtype = dtype
        self.linears = layers.quantizable(model)
        self.copies = {UNQUANTIZED: self.linears}  # {bits: {full name: Linear}}
        for width in bits:
            self.copies[width] = {
                name: quantization.quantized_copy(linear, width, dtype)
                for name, linear in self.linears.items()
            }
            for copy in self.copies[width].values():
                nf4.pack_for_cpu(copy)

    def switch(self, widths: dict[str, int], rest: int) -> tuple[int, int]:
        """Switch some Linears to their own widths and all others to one width.

        Args:
            widths: {full name of a Linear: bits}.
            rest: bits of all other Linears.

        Returns:
            The numbers of Linears quantized and kept, counted in the model.

        Raises:
            UserError: a name that is no quantizable Linear.
            VariantError: the counts are not those of the request.
        """
        if unknown := widths.keys() - self.linears.keys():
            raise UserError(
                f"'{min(unknown)}' changes nothing: "
                "no Linear that can be quantized has this name"
            )
        wanted = {name: widths.get(name, rest) for name in self.linears}
        for name, width in wanted.items():
            self.model.set_submodule(name, self.copies[width][name])
        counts = quantization.count_linears(self.model)
        quantized = sum(width != UNQUANTIZED for width in wanted.values())
        if counts != (quantized, len(wanted) + 1 - quantized):
            raise VariantError(
                f"{quantized} Linears were to be quantized, but {counts[0]} are"
            )
        return counts

    def linears_under(self, prefixes: Iterable[str]) -> list[str]:
        """Return the full names of the Linears under some prefixes.

        Raises UserError for a prefix that matches none.
        """
        names = quantization.modules_to_skip(self.model, prefixes)
        return [name for name in names if name in self.linears]

    def restore(self) -> nn.Module:
        """Return the model with no Linear quantized."""
        self.switch({}, UNQUANTIZED)
        return self.model

    def linear_bytes(self, bits: int) -> dict[str, int]:
        """Return the bytes of each Linear at a width: {full name: bytes}.

        Bias and quantization state count, see ``quantization.resident_bytes``.
        """
        return {
            name: quantization.resident_bytes(linear)
            for name, linear in self.copies[bits].items()
        }


class _StoredBlock(nn.Module):
    """Stand in for a block: return its stored outputs, batch by batch."""

    def __init__(self, outputs: list):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, *_, **__):
        return next(self.outputs)


class CachedEvaluator:
    """Evaluate many choices of widths that differ little from one base width.

    The first evaluation stores the base's outputs of every block for all images, on
    the model's device. Every evaluation starts at the first block that holds a changed
    Linear. The blocks before have the base's weights, and so the base's outputs.

    Args:
        switchable: the model.
        loaded: the variant that the model belongs to.
        images: images to evaluate on.
        base: bits of the Linears that no choice names.
        replay: False: store nothing and compute all blocks, for choices that differ
            from the base nearly from the start.
    """

    def __init__(
        self,
        switchable: SwitchableModel,
        loaded: LoadedVariant,
        images: ReferenceAnswers,
        base: int,
        replay: bool = True,
    ):
        self.switchable = switchable
        self.loaded = loaded
        self.images = images
        self.base = base
        self.replay = replay
        self.blocks = layers.transformer_blocks(switchable.model)
        self.outputs: dict[str, list] = {}  # {block: outputs, batch by batch}

    def evaluate(self, widths: dict[str, int]) -> dict:
        """Score one choice: some Linears at their own widths, all others at the base's.

        Returns:
            linears_quantized and linears_kept as counted, and the scores of
            ``ReferenceAnswers.scores``.
        """
        if self.replay and not self.outputs:
            self._store_outputs()
        quantized, kept = self.switchable.switch(widths, self.base)
        changed = [name for name, width in widths.items() if width != self.base]
        with self._stand_ins(self._unchanged_blocks(changed)):
            scores = self.images.scores(self._logits())
        return {"linears_quantized": quantized, "linears_kept": kept} | scores

    def _logits(self) -> torch.Tensor:
        return compute_logits(self.loaded, self.images.pixels, self.switchable.dtype)

    def _unchanged_blocks(self, changed: list[str]) -> list[str]:
        """Return the blocks before the first that holds a changed Linear.

        These are all blocks if nothing changed. They are none if a changed Linear lies
        outside the blocks, where it may run before them.
        """
        if not self.replay:
            return []
        block_of = {name: self._block_index(name) for name in changed}
        if None in block_of.values():
            return []
        first = min(block_of.values(), default=len(self.blocks))
        return self.blocks[:first]

    def _block_index(self, linear: str) -> int | None:
        """Return the index of the block that holds a Linear, None for no block."""
        for i, block in enumerate(self.blocks):
            if linear.startswith(f"{block}."):
                return i
        return None

    def _store_outputs(self) -> None:
        """Run the base once and store the outputs of every block, batch by batch."""
        self.switchable.switch({}, self.base)
        hooks = []
        for name in self.blocks:
            outputs = self.outputs[name] = []
            block = self.switchable.model.get_submodule(name)
            hooks.append(
                block.register_forward_hook(
                    lambda _block, _inputs, output, to=outputs: to.append(output)
                )
            )
        try:
            self._logits()
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _stand_ins(self, blocks: list[str]) -> Iterator[None]:
        """Replace some blocks by their stored outputs."""
        model = self.switchable.model
        real = {name: model.get_submodule(name) for name in blocks}
        for name in blocks:
            model.set_submodule(name, _StoredBlock(self.outputs[name]))
        try:
            yield
        finally:
            for name, block in real.items():
                model.set_submodule(name, block)
