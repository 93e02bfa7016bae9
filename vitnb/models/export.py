"""Export quantized checkpoints from a study's full-precision one."""

from pathlib import Path

import torch

from vitnb import devices
from vitnb.models import checkpoints, layers, quantization
from vitnb.records.files import new_folder
from vitnb.study import Study

EXPORTS = ("merged", "nf4", "int8")  # the checkpoints that fine-tuning writes


def save_quantized(merged: Path, folder: Path, weights: str, kept: list[str]) -> None:
    """Quantize a full-precision checkpoint and save it, without its preprocessing.

    Args:
        merged: the full-precision checkpoint.
        folder: where to save.
        weights: ``nf4`` or ``int8``.
        kept: full names of the Linears to keep in 16 bits, the head among them.

    Raises:
        VariantError: other Linears were quantized than should be.
    """
    model = checkpoints.read_model(
        merged,
        dtype=torch.bfloat16,
        quantization_config=quantization.bnb_config(weights, kept),
        device_map={"": devices.select_device()},
    )
    head = layers.head_name(model)
    planned = {name: 16 for name in kept if name != head}
    quantization.check_counts(model, quantized=True, planned=planned)
    quantization.disable_cpu_packing(model).save_pretrained(folder)


def export_plan(study: Study, name: str, kept: list[str]) -> Path:
    """Write the checkpoint of a plan, ``checkpoints/plan-NAME``, whole or not at all.

    Args:
        study: a fine-tuned study.
        name: the plan's name.
        kept: full names of the Linears to keep in 16 bits, the head among them; all
            others are NF4.

    Returns:
        The checkpoint's folder.
    """
    merged = study.checkpoint("merged")
    final = study.checkpoint(f"plan-{name}")
    with new_folder(final) as part:
        save_quantized(merged, part, "nf4", kept)
        checkpoints.load_processor(merged).save_pretrained(part)
    return final


def fingerprints(study: Study) -> dict[str, str]:
    """Return the SHA-256 of each of a study's exports.

    They tell these exports from those of another fine-tuning.
    """
    return {name: checkpoints.fingerprint(study.checkpoint(name)) for name in EXPORTS}
