"""Layer sensitivity: keep some layers in 16 bits, quantize the others, and see how far the answers move.

One model is loaded once; every Linear gets a quantized twin, and a configuration is a choice between the two.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from vitnb import accuracy, data, intervals, quantize
from vitnb.errors import VariantError
from vitnb.models import Loaded
from vitnb.records import write_whole

BATCH_SIZE = 128


def layers(model: nn.Module) -> list[str]:
    """Full names of the transformer blocks, first to last: the longest list of modules that hold Linears."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = max(((n, m) for n, m in lists if quantize.linears(m)), key=lambda item: len(item[1]))
    return [f"{name}.{i}" for i in range(len(blocks))]


def configurations(model: nn.Module) -> dict[str, list[str]]:
    """Which blocks stay in 16 bits in each configuration: none, all, first and last, and every one in turn."""
    blocks = layers(model)
    return {"none": [], "all": blocks, "first and last": [blocks[0], blocks[-1]]} | {
        f"layer {i}": [b] for i, b in enumerate(blocks)
    }


class Switchboard:
    """A 16-bit model whose Linears can be switched one by one to their quantized twins (4 or 8 bits)."""

    def __init__(self, model: nn.Module, bits: int, dtype: torch.dtype):
        self.model = model.to(dtype)
        self.plain = {name: module for name, module in quantize.linears(model).items() if name != quantize.head(model)}
        self.twins = {name: quantize.quantized_copy(module, bits, dtype) for name, module in self.plain.items()}

    def keep(self, blocks: list[str]) -> tuple[int, int]:
        """Keep the Linears under ``blocks`` in 16 bits and quantize all others; returns (quantized, kept), as counted.

        Raises UserError for a block without Linears, VariantError if the model does not end up as asked.
        """
        for name, module in self.plain.items():  # named_modules() must see the plain ones to match names
            self.model.set_submodule(name, module)
        kept = set(quantize.keep(self.model, blocks))
        for name in self.plain.keys() - kept:
            self.model.set_submodule(name, self.twins[name])
        counted = quantize.count(self.model)
        if counted != (len(self.plain) + 1 - len(kept), len(kept)):
            raise VariantError(f"{len(kept)} Linears were to be kept, but {counted[1]} are")
        return counted

    def restore(self) -> nn.Module:
        """The model with no Linear quantized."""
        self.keep([*self.plain])
        return self.model


class _Pass(nn.Module):
    """Stands in for a block that need not be computed: hands on what comes in or, given outputs, the next of those."""

    def __init__(self, outputs: list[torch.Tensor] | None = None):
        super().__init__()
        self.outputs = iter(outputs or [])

    def forward(self, hidden, *_, **__):
        return next(self.outputs, hidden)


@contextmanager
def _recorded(model: nn.Module, blocks: list[str], outputs: dict[str, list[torch.Tensor]]):
    """Collect the outputs of every block, batch by batch, into ``outputs``."""
    hooks = []
    for name in blocks:
        outputs[name] = kept = []
        hooks.append(model.get_submodule(name).register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out)))
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _replayed(model: nn.Module, blocks: list[str], outputs: dict[str, list[torch.Tensor]]):
    """Replace the first blocks by what they gave before: computed with the same weights, they would give it again."""
    real = {name: model.get_submodule(name) for name in blocks}
    for name in blocks:
        model.set_submodule(name, _Pass(outputs[name] if name == blocks[-1] else None))
    yield
    for name, module in real.items():
        model.set_submodule(name, module)


def _logits(loaded: Loaded, pixels: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """float64 [images, classes] on the CPU, from batches of float32 [batch, 3, height, width]."""
    with loaded.running() as model:
        return torch.cat([model(pixel_values=batch.to(loaded.device, dtype)).logits.double().cpu() for batch in pixels])


def sensitivity(loaded: Loaded, valid: data.Split, bits: list[int], dtype: torch.dtype) -> list[dict]:
    """Top-1 and KL to full precision of every configuration, on the same validation images.

    Args:
        loaded: the full-precision variant; it is changed to ``dtype``, the 16-bit type.
        bits: 4, 8 or both.

    Returns:
        one row a configuration: bits, kept (its name), linears_quantized, linears_kept, top1, kl (mean), and raw by
        image: predicted and kl_by_image.
    """
    pixels = [batch for batch, _ in data.batches(data.Pixels(valid, loaded.processor), BATCH_SIZE)]
    labels = torch.tensor(valid.labels)
    blocks = layers(loaded.model)
    reference = _logits(loaded, pixels, loaded.dtype)
    rows = [{"bits": 32, "kept": "full precision", "linears_quantized": 0, "linears_kept": loaded.linears_kept}]
    rows[0] |= _scores(reference, reference, labels)
    for width in bits:
        board, outputs = Switchboard(loaded.model, width, dtype), {}
        for name, kept_blocks in configurations(loaded.model).items():
            quantized, kept = board.keep(kept_blocks)
            row = {"bits": width, "kept": name, "linears_quantized": quantized, "linears_kept": kept}
            # With one block kept, those before it are quantized as in "none", which ran first: half of the work.
            before = blocks[: blocks.index(kept_blocks[0])] if len(kept_blocks) == 1 else []
            with (
                _recorded(loaded.model, blocks, outputs) if name == "none" else _replayed(loaded.model, before, outputs)
            ):
                logits = _logits(loaded, pixels, dtype)
            rows.append(row | _scores(reference, logits, labels))
            print(f"{width}-bit, kept: {name:15s} top-1 {rows[-1]['top1']:.4f}  KL {rows[-1]['kl']:.5f}", flush=True)
        board.restore()
    return rows


def _scores(reference: torch.Tensor, other: torch.Tensor, labels: torch.Tensor) -> dict:
    divergence, predicted = accuracy.kl(reference, other), other.argmax(-1)
    return {
        "top1": (predicted == labels).double().mean().item(),
        "kl": divergence.mean().item(),
        "predicted": predicted.tolist(),
        "kl_by_image": accuracy.six_digits(divergence),
    }


def recommended(rows: list[dict], bits: int, count: int = 3) -> list[str]:
    """The layers to keep first: those whose keeping lowers the KL most.

    Only layers that lower it on the same images beyond noise: paired t-test, corrected for their number (Holm).
    """
    of_width = {row["kept"]: np.asarray(row["kl_by_image"]) for row in rows if row["bits"] == bits}
    single = [name for name in of_width if name.startswith("layer ")]
    p = intervals.holm([intervals.farther(of_width["none"], of_width[name]) for name in single])
    lower = [name for name, found in zip(single, p, strict=True) if found < 1 - intervals.LEVEL]
    return sorted(lower, key=lambda name: of_width[name].mean())[:count]


def table(rows: list[dict]) -> pd.DataFrame:
    """The rows without the raw values of single images."""
    return pd.DataFrame(rows).drop(columns=["predicted", "kl_by_image"])


def write_csv(rows: list[dict], path: Path) -> Path:
    """Write the table as CSV, whole or not at all."""
    write_whole(path, table(rows).to_csv(index=False, lineterminator="\n"))
    return path
