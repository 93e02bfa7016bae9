"""Checkpoints: folders with a model that plain transformers can load.

``AutoModelForImageClassification`` and ``AutoImageProcessor`` load a checkpoint without
this package. It holds the weights (safetensors), the preprocessing and the class names
that the model was trained with.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
)

from vitnb import BASES_FROM_HUB
from vitnb.errors import UserError, one_line
from vitnb.records.files import MARKER

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Arguments of every ``from_pretrained``: no code of a checkpoint runs, nobody is asked
# whether it may, and a folder that is missing is not looked for on the hub.
SAFE = {"trust_remote_code": False, "local_files_only": True}


class HubName(str):
    """The name of a model on the hub, which a study gives as its ``base``.

    ``pretrained.find_base`` alone makes one. Nothing else is ever fetched.
    """


@contextmanager
def _open_hub() -> Iterator[None]:
    """Let the hub's library reach the network, unless the user has closed it."""
    closed = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = closed and BASES_FROM_HUB not in os.environ
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = closed


@cache
def fetch_base(name: HubName) -> Path:
    """Return the folder of a base model from the hub; fetch what is not there yet.

    Only weights in safetensors and JSON files are fetched.

    Raises:
        UserError: it cannot be fetched, or it holds no safetensors.
    """
    print(f"base model: {name}, from the hub", flush=True)
    try:
        with _open_hub():
            folder = huggingface_hub.snapshot_download(
                name,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["*/*"],
            )
    except Exception as error:  # the library may raise anything
        raise UserError(
            f"base '{name}' is no folder, and the hub does not give it: "
            f"{one_line(error)}"
        ) from None
    return require_safetensors(Path(folder))


def _reason(error: Exception) -> str:
    """Return why transformers does not open a checkpoint, in one line."""
    if "custom code" in str(error):
        return "it asks for code of its own, which is never run: take another model"
    return one_line(error)


def local_folder(source: str | Path) -> str | Path:
    """Return the folder to read from; that of a ``HubName`` is fetched."""
    return fetch_base(source) if isinstance(source, HubName) else source


def require_safetensors(folder: Path) -> Path:
    """Return the folder if opening its weights runs no code.

    Raises:
        UserError: it holds pickles, no weights at all, or an adapter: transformers
            would then load the weights that the adapter names, from elsewhere.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter and not a whole model: merge it into its base"
        )
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

    Args:
        source: a folder, or the base of a study as ``find_base`` gives it.

    Raises:
        UserError: there is none, or it is broken.
    """
    folder = local_folder(source)
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", **SAFE)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{source} has no preprocessing (preprocessor_config.json): "
            f"{_reason(error)}"
        ) from None


def image_sides(processor) -> tuple[int, int]:
    """Return height and width, in pixels, of the images that a processor gives.

    They are those of its centre crop if it makes one, else of its resizing.
    """
    crops = getattr(processor, "do_center_crop", False)
    size = processor.crop_size if crops else processor.size
    edge = size.get("shortest_edge")
    return size.get("height", edge), size.get("width", edge)


@torch.inference_mode()
def check_image_size(model: nn.Module, processor, source: str | Path) -> None:
    """Check that a model takes images of the size that its preprocessing gives.

    Some families interpolate their positions, so no number in the config says it. One
    black image is run, in the model's own type.

    Raises:
        UserError: it does not, or the preprocessing gives no fixed size.
    """
    height, width = image_sides(processor)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UserError(
            f"the preprocessing of {source} gives images of no fixed size: "
            "mend its preprocessor_config.json"
        )
    shape = (1, model.config.num_channels, height, width)
    pixels = torch.zeros(shape, device=model.device, dtype=model.dtype)
    try:
        model.eval()(pixel_values=pixels)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{source} does not take images of {height} x {width} pixels, which its "
            f"preprocessing gives ({one_line(error)}): "
            "mend its preprocessor_config.json"
        ) from None


def read_config(source: str | Path, **options) -> PreTrainedConfig:
    """Return the config of a base model or a checkpoint; no code of its own runs.

    Args:
        source: a folder, or the base of a study as ``find_base`` gives it.
        options: further arguments of ``from_pretrained``.

    Raises:
        UserError: it cannot be read.
    """
    folder = local_folder(source)
    try:
        return AutoConfig.from_pretrained(folder, **SAFE, **options)
    except Exception as error:  # transformers may raise anything
        raise UserError(
            f"{Path(folder) / 'config.json'} cannot be read: {_reason(error)}"
        ) from None


def read_model(source: str | Path, **options) -> nn.Module:
    """Load an image classifier, without pickles and without code of its own.

    Args:
        source: a folder, or the base of a study as ``find_base`` gives it.
        options: further arguments of ``from_pretrained``.

    Returns:
        The model; with ``output_loading_info=True`` also what fitted; see
        ``describe_misfits``.

    Raises:
        UserError: loading fails, with the library's reason in one line.
    """
    folder = local_folder(source)
    try:
        return AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, **SAFE, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {source}: {_reason(error)}") from None


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
    """Return the bytes of all files of a checkpoint, without this package's marker."""
    files = (path for path in folder.rglob("*") if path.name != MARKER)
    return sum(path.stat().st_size for path in files if path.is_file())


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint: weights, config and preprocessing.

    A record keeps it to say which model a number belongs to.
    """
    digest = hashlib.sha256()
    settings = (folder / "config.json", folder / "preprocessor_config.json")
    for path in [*sorted(folder.glob("*.safetensors")), *settings]:
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
