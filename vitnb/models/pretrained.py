"""Bases: from a pretrained model, the study's own or any of the ViT family, to a classifier of the study's classes."""

from pathlib import Path

import torch
from torch import nn

from vitnb import devices
from vitnb.errors import UserError, one_line
from vitnb.models import checkpoints, layers, quantization
from vitnb.study import ROOT, Study

OURS = "data/base"  # the base that comes with this repository


def find_base(study: Study) -> str:
    """The study's base model as a local folder or, where the study names one, a hub name.

    Raises UserError, with the command that makes or restores it, if it is missing.
    """
    if study.pretrain:
        if not study.own_base.is_dir():
            raise UserError(f"no base model at {study.own_base}: make it with 'python -m vitnb pretrain {study.typed}'")
        return str(checkpoints.require_safetensors(study.own_base))
    folder = ROOT / study.base
    if folder.is_dir():
        return str(checkpoints.require_safetensors(folder))
    if study.base.startswith("outputs/"):  # what another study has pretrained
        raise UserError(
            f"no base model at {folder}: make it with 'python -m vitnb pretrain {Path(study.base).parts[1]}'"
        )
    if study.base == OURS:
        raise UserError(f"no base model at {folder}: restore it with 'git checkout {OURS}'")
    if study.base.startswith((".", "/", "data/")):
        raise UserError(
            f"no base model at {folder}: put the checkpoint there (config.json, *.safetensors and its preprocessing)"
        )
    return study.base


def load_base(study: Study, class_names: list[str], weights: str = "fp32") -> nn.Module:
    """The base model with a head for ``class_names``, in full precision or quantized for QLoRA.

    The head is the base's own if it has one for as many classes, else a fresh one; ``replaced_classes`` of the model says how
    many classes a head had that was replaced, 0 if none was.

    Args:
        weights: ``fp32``, ``nf4`` or ``int8``.

    Raises:
        UserError: no base, or one whose weights or preprocessing do not fit its config.
    """
    if weights not in ("fp32", "nf4", "int8"):
        raise UserError(f"base_precision must be fp32, nf4 or int8, got '{weights}'")
    labels = dict(enumerate(class_names))
    options = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}, "ignore_mismatched_sizes": True}
    base, on = find_base(study), devices.select_device()
    # By its number: the threads in which transformers loads know only the first GPU, whichever is set.
    if on.type == "cuda":
        on = torch.device("cuda", torch.cuda.current_device())
    model, found = checkpoints.read_model(base, dtype=torch.float32, output_loading_info=True, **options)
    head = layers.head_name(model)
    if wrong := checkpoints.describe_misfits(found, fresh=(head, "pooler")):
        raise UserError(f"{base}: {wrong}: take a checkpoint that transformers has saved")
    _check_size(model, base)
    replaced = max((key[1][0] for key in found["mismatched_keys"]), default=0)
    if weights != "fp32":
        # The head is the full-precision load's: every precision starts alike, and no loader (transformers 5.17 does)
        # leaves a head of the base's size on a quantized model.
        fresh, settings = model.get_submodule(head), quantization.bnb_config(weights, quantization.modules_to_skip(model), devices.compute_dtype(on))
        model = checkpoints.read_model(
            base, dtype=torch.float32, quantization_config=settings, device_map={"": on}, **options
        )
        model.set_submodule(head, fresh.to(on))
        quantization.check_counts(model, quantized=True)
        quantization.disable_cpu_packing(model)
    model.set_attn_implementation("vitnb-sdpa")
    model.replaced_classes = replaced
    return model.to(on)


@torch.inference_mode()
def _check_size(model: nn.Module, base: str) -> None:
    """Raise UserError if the model does not take images of the size that its own preprocessing gives."""
    height, width = checkpoints.image_sides(checkpoints.load_processor(base))
    try:
        model.eval()(pixel_values=torch.zeros(1, model.config.num_channels, height, width))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{base} does not take images of {height} x {width} pixels, which its preprocessing gives ({one_line(error)}): "
            "mend its preprocessor_config.json"
        ) from None
