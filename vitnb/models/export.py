"""TODO."""

from pathlib import Path

import torch

from vitnb import devices
from vitnb.models import checkpoints, layers, quantization
from vitnb.records.files import new_folder
from vitnb.study import Study

EXPORTS = ("merged", "nf4", "int8")


def save_quantized(merged: Path, folder: Path, weights: str, kept: list[str]) -> None:
    """Quantize a full-precision checkpoint to ``nf4`` or ``int8``, but for the Linears ``kept`` (full names, the head among them),
    and save it in ``folder``, without its preprocessing."""
    settings = quantization.bnb_config(weights, kept)
    small = checkpoints.read_model(
        merged, dtype=torch.bfloat16, quantization_config=settings, device_map={"": devices.select_device()}
    )
    head = layers.head_name(small)
    quantization.check_counts(small, quantized=True, planned={name: 16 for name in kept if name != head})
    quantization.disable_cpu_packing(small).save_pretrained(folder)


def export_plan(study: Study, name: str, kept: list[str]) -> Path:
    """Write ``checkpoints/plan-NAME``, NF4 but for the Linears ``kept`` in 16 bits and the head, whole or not at all."""
    merged, final = study.checkpoint("merged"), study.checkpoint(f"plan-{name}")
    with new_folder(final) as part:
        save_quantized(merged, part, "nf4", kept)
        checkpoints.load_processor(merged).save_pretrained(part)
    return final


def fingerprints(study: Study) -> dict[str, str]:
    """What tells a study's exports from those of another fine-tuning; see ``checkpoints.fingerprint``."""
    return {name: checkpoints.fingerprint(study.checkpoint(name)) for name in EXPORTS}
