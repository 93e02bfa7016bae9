"""Checkpoints: folders with a model that plain transformers can load.

``AutoModelForImageClassification`` and ``AutoImageProcessor`` load a checkpoint without
this package. It holds the weights (safetensors), the preprocessing and the class names
that the model was trained with.
"""

import hashlib
from pathlib import Path

from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from vitnb.errors import UserError, one_line

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def require_safetensors(folder: Path) -> Path:
    """Return the folder if opening its weights runs no code.

    Raises:
        UserError: it holds pickles, or no weights at all.
    """
    if not list(folder.glob("*.safetensors")):
        pickles = [path for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise UserError(
                f"{pickles[0]} is a pickle, which can run code when opened: "
                "save the model as safetensors"
            )
        raise UserError(f"{folder} holds no *.safetensors: it is not a checkpoint")
    return folder


def load_processor(source: str | Path):
    """Return the image processor of a base model or a checkpoint.

    It always works on Pillow images, so that every variant gets the same pixels.

    Raises:
        UserError: there is none, or it is broken.
    """
    try:
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} has no preprocessing (preprocessor_config.json): "
            f"{one_line(error)}"
        ) from None


def image_sides(processor) -> tuple[int, int]:
    """Return height and width, in pixels, of the images that a processor gives.

    They are those of its centre crop if it makes one, else of its resizing.
    """
    crops = getattr(processor, "do_center_crop", False)
    size = processor.crop_size if crops else processor.size
    edge = size.get("shortest_edge")
    return size.get("height", edge), size.get("width", edge)


def read_model(source: str | Path, **options) -> nn.Module:
    """Load an image classifier, without pickles and without remote code.

    Args:
        source: a folder, or a name on the hub.
        options: further arguments of ``from_pretrained``.

    Returns:
        The model; with ``output_loading_info=True`` also what fitted; see
        ``describe_misfits``.

    Raises:
        UserError: loading fails, with the library's reason in one line.
    """
    try:
        return AutoModelForImageClassification.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {source}: {one_line(error)}") from None


def describe_misfits(info: dict, fresh: tuple[str, ...] | None = None) -> str:
    """Say which weights do not fit the config; return nothing if all do.

    Args:
        info: transformers' loading info, with the names of missing, unexpected and
            mismatched weights.
        fresh: for a base model, parts of the names of new weights. These may be missing
            or have another shape, and the file may hold more weights than are read.
    """
    kinds = ["missing_keys", "mismatched_keys"]
    if fresh is None:
        kinds.insert(1, "unexpected_keys")
    for kind in kinds:
        misfits = {
            _describe_key(key)
            for key in info[kind]
            if not any(part in _key_name(key) for part in fresh or ())
        }
        if misfits:
            return (
                f"config and weights do not fit: {len(misfits)} "
                f"{kind.replace('_', ' ')}, such as {min(misfits)}"
            )
    return ""


def _key_name(key: str | tuple) -> str:
    """Return the weight's name from an entry of the loading info."""
    return key[0] if isinstance(key, tuple) else key


def _describe_key(key: str | tuple) -> str:
    """Return the weight's name and, if its shape is wrong, both shapes."""
    if isinstance(key, tuple):
        name, in_file, in_model = key
        return f"{name}: {list(in_file)} and not {list(in_model)}"
    return key


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights.

    A record keeps it to say which model a number belongs to.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
