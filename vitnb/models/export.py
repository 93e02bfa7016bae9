"""Export quantized checkpoints from a study's full-precision one."""

from pathlib import Path

from vitnb import devices
from vitnb.models import checkpoints, layers, nf4, quantization
from vitnb.records.files import new_folder
from vitnb.study import Study

EXPORTS = ("merged", "nf4", "int8")  # the checkpoints that fine-tuning writes

# What markers of folders say, see ``files.new_folder``.
CHECKPOINTS = "checkpoints of a study"
PLAN_CHECKPOINT = "the checkpoint of a plan"


def is_export(folder: Path) -> bool:
    """Tell whether a folder holds one exported model, and no folders of something else.

    Older versions wrote no marker: what they wrote is known by its content.
    """
    return (
        (folder / "config.json").is_file()
        and any(folder.glob("*.safetensors"))
        and not any(path.is_dir() for path in folder.iterdir())
    )


def is_checkpoints(folder: Path) -> bool:
    """Tell whether a folder holds exports of a study alone; see ``is_export``."""
    return all(
        (path.name in EXPORTS or path.name.startswith("plan-")) and is_export(path)
        for path in folder.iterdir()
    )


def save_quantized(merged: Path, folder: Path, weights: str, kept: list[str]) -> None:
    """Quantize a full-precision checkpoint and save it, without its preprocessing.

    It is rounded to the device's 16-bit type first, as ``SwitchableModel`` does: both
    quantize the same numbers.

    Args:
        merged: the full-precision checkpoint.
        folder: where to save.
        weights: ``nf4`` or ``int8``.
        kept: full names of the Linears to keep in 16 bits, the head among them.

    Raises:
        VariantError: other Linears were quantized than should be.
    """
    device = devices.select_device()
    half = devices.half_dtype(device)
    model = checkpoints.read_model(
        merged,
        dtype=half,
        quantization_config=quantization.bnb_config(weights, kept, half),
        device_map={"": device},
    )
    head = layers.head_name(model)
    planned = {name: 16 for name in kept if name != head}
    quantization.check_counts(model, quantized=True, planned=planned)
    nf4.disable_cpu_packing(model).save_pretrained(folder)


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
    with new_folder(final, PLAN_CHECKPOINT, reads=[merged], is_own=is_export) as part:
        save_quantized(merged, part, "nf4", kept)
        checkpoints.load_processor(merged).save_pretrained(part)
    return final


def fingerprints(study: Study) -> dict[str, str]:
    """Return the SHA-256 of each of a study's exports.

    They tell these exports from those of another fine-tuning.
    """
    return {name: checkpoints.fingerprint(study.checkpoint(name)) for name in EXPORTS}
