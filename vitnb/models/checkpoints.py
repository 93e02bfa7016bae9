"""Checkpoints: folders that ``AutoModelForImageClassification`` and ``AutoImageProcessor`` load without this package.

Each carries its weights (safetensors), the preprocessing and the class names that it was trained with.
"""

import hashlib
from pathlib import Path

from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitnb.errors import UserError, one_line


def require_safetensors(folder: Path) -> Path:
    """The folder, once it is sure that opening it runs no code: safetensors only, no pickles."""
    if not list(folder.glob("*.safetensors")):
        pickles = [
            path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for path in folder.glob(suffix)
        ]
        if pickles:
            raise UserError(
                f"{folder / pickles[0]} is a pickle, which can run code when opened: save the model as safetensors"
            )
        raise UserError(f"{folder} holds no *.safetensors: it is not a checkpoint")
    return folder


def load_processor(source: str | Path):
    """The image processor that travels with a base or a checkpoint, always on Pillow: one preprocessing for all."""
    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{source} has no preprocessing (preprocessor_config.json): {one_line(error)}") from None


def image_sides(processor) -> tuple[int, int]:
    """Height and width in pixels of what an image processor gives: its centre crop if it makes one, else its size."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    edge = size.get("shortest_edge")
    return (size.get("height", edge), size.get("width", edge))


def read_model(source: str | Path, **options) -> nn.Module:
    """``from_pretrained`` of an image classifier, without pickles and without remote code; UserError, in one line, if it fails."""
    try:
        return AutoModelForImageClassification.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {source}: {one_line(error)}") from None


def describe_misfits(found: dict, fresh: tuple[str, ...] | None = None) -> str:
    """What transformers' loading info says that is missing, left over or of another shape, in words; nothing if all fits.

    ``fresh``: parts of names that a base may lack, or have in another shape; it may hold more than is asked of it, too.
    """
    kinds = (
        ("missing_keys", "unexpected_keys", "mismatched_keys") if fresh is None else ("missing_keys", "mismatched_keys")
    )
    for kind in kinds:
        named = {
            f"{k[0]}: {list(k[1])} and not {list(k[2])}" if isinstance(k, tuple) else k
            for k in found[kind] if not any(part in (k[0] if isinstance(k, tuple) else k) for part in fresh or ())
        }  # fmt: skip
        if named:
            return f"config and weights do not fit: {len(named)} {kind.replace('_', ' ')}, such as {min(named)}"
    return ""


def disk_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights: which model a number belongs to."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
