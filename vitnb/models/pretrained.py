"""Base models: from a pretrained model to a classifier of a study's classes."""

from pathlib import Path

import torch
from torch import nn

from vitnb import devices
from vitnb.errors import UserError
from vitnb.models import attention, checkpoints, layers, nf4, quantization
from vitnb.records.identity import Checkpoints
from vitnb.records.parameters import check_parameter
from vitnb.study import ROOT, Study

OURS = "data/base"  # the base model that comes with this repository


def find_base(study: Study) -> str:
    """Return the study's base model: a local folder, or a ``HubName``.

    Nothing is fetched here. Who reads the base fetches it.

    Raises:
        UserError: a local folder is missing. The message holds the command that makes
            or restores it.
    """
    local = ROOT / Path(study.base).expanduser()
    folder = study.own_base if study.pretrain else local
    if folder.is_dir():
        return str(checkpoints.require_safetensors(folder))
    if study.pretrain:
        fix = f"make it with 'python -m vitnb pretrain {study.typed}'"
    elif study.base.startswith("outputs/"):  # the base that another study pretrains
        other = Path(study.base).parts[1]
        fix = f"make it with 'python -m vitnb pretrain {other}'"
    elif study.base == OURS:
        fix = f"restore it with 'git checkout {OURS}'"
    elif study.base.startswith((".", "/", "~", "data/")):
        fix = (
            "put the checkpoint there "
            "(config.json, *.safetensors and its preprocessing)"
        )
    else:
        return checkpoints.HubName(study.base)
    raise UserError(f"no base model at {folder}: {fix}")


def identify_base(study: Study) -> Checkpoints:
    """Return the study's base with its checksum, for the identity of a run.

    Raises UserError as ``find_base`` does, or if the base cannot be fetched.
    """
    folder = Path(checkpoints.local_folder(find_base(study)))
    return Checkpoints({"base": checkpoints.fingerprint(folder)})


def load_base(study: Study, class_names: list[str], weights: str = "fp32") -> nn.Module:
    """Load the base model with a head for ``class_names``.

    The head is the base's own if it has one for as many classes, else a new one. The
    model's ``replaced_classes`` is the number of classes of a head that was replaced, 0
    if none was.

    Args:
        study: names the base model.
        class_names: the classes, in the order of their indices.
        weights: ``fp32``, or ``nf4`` or ``int8`` for QLoRA.

    Raises:
        UserError: there is no base, or its weights or preprocessing do not fit its
            config.
    """
    check_parameter("base_precision", weights)
    base = find_base(study)
    device = _indexed_device()
    options = {
        "dtype": torch.float32,
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: i for i, name in enumerate(class_names)},
        "ignore_mismatched_sizes": True,
    }
    model, info = checkpoints.read_model(base, output_loading_info=True, **options)
    new_weights = (layers.head_name(model), "pooler")
    if misfits := checkpoints.describe_misfits(info, fresh=new_weights):
        raise UserError(
            f"{base}: {misfits}: take a checkpoint that transformers has saved"
        )
    checkpoints.check_image_size(model, checkpoints.load_processor(base), base)
    if weights != "fp32":
        model = _load_quantized(base, weights, model, device, options)
    model.set_attn_implementation(attention.implementation("sdpa"))
    sizes_in_file = (key[1][0] for key in info["mismatched_keys"])
    model.replaced_classes = max(sizes_in_file, default=0)
    return model.to(device)


def _indexed_device() -> torch.device:
    """Return the device, a GPU with its number.

    The threads in which transformers loads know only the first GPU, whichever is set.
    """
    device = devices.select_device()
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _load_quantized(
    base: str, weights: str, plain: nn.Module, device: torch.device, options: dict
) -> nn.Module:
    """Load a base model in ``nf4`` or ``int8``, with the head of the plain model.

    So every precision starts with the same head. A loader may also leave a head of the
    base's size on a quantized model (transformers 5.17 does).
    """
    settings = quantization.bnb_config(
        weights,
        quantization.modules_to_skip(plain),
        devices.compute_dtype(device),
    )
    model = checkpoints.read_model(
        base, quantization_config=settings, device_map={"": device}, **options
    )
    head = layers.head_name(plain)
    model.set_submodule(head, plain.get_submodule(head).to(device))
    quantization.check_counts(model, quantized=True)
    return nf4.disable_cpu_packing(model)
