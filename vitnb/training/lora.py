"""Fine-tune with LoRA (arXiv:2106.09685) or QLoRA (arXiv:2305.14314), and export.

The adapters and the classification head are trained, and nothing else (see ``loop``). A
new head must be trained: a random one gives the accuracy of guessing.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from vitnb.errors import UserError, suggest
from vitnb.models import checkpoints, export, layers, pretrained, quantization
from vitnb.records.files import check_new_folder, new_folder
from vitnb.records.parameters import check_parameter
from vitnb.study import Study


def find_targets(model: nn.Module, asked: str) -> list[str]:
    """Return the full names of the Linears that get an adapter.

    Args:
        asked: ``all`` for every Linear but the head, or names separated by commas:
            ``attention``, ``mlp``, ``q_proj``, ``fc1`` ... A name chooses each Linear
            that has it as a part of its path.

    Raises:
        UserError: a name that chooses no Linear.
    """
    names = list(layers.quantizable(model))
    if asked == "all":
        return names
    chosen = set()
    for part in asked.replace(" ", "").split(","):
        matches = {name for name in names if part in name.split(".")}
        if not matches:
            parts = [p for name in names for p in name.split(".") if not p.isdigit()]
            hint = suggest(part, ["all", *dict.fromkeys(parts)])
            raise UserError(f"targets: no Linear is called '{part}': {hint}")
        chosen |= matches
    return [name for name in names if name in chosen]


def add_adapters(
    study: Study,
    class_names: list[str],
    *,
    rank: int = 8,
    alpha: int = 32,
    dropout: float | None = None,
    targets: str = "all",
    base_precision: str = "fp32",
    gradient_checkpointing: bool = False,
    seed: int | None = None,
) -> PeftModel:
    """Load the study's base, and add LoRA adapters and a head to be trained.

    Args:
        rank: of the adapters.
        alpha: an adapter's product is scaled by alpha / rank.
        dropout: before the adapters; None for ``study.finetune.dropout``.
        targets: which Linears get an adapter, see ``find_targets``.
        base_precision: ``fp32`` (LoRA), or ``nf4`` or ``int8`` (QLoRA: the frozen base
            is quantized during the training).
        gradient_checkpointing: save memory by computing activations twice.
        seed: of adapters, head and the dropout of the training; None to leave
            PyTorch's generators as they are.

    Raises:
        UserError: a rank or alpha below 1, or an unknown target or precision.
    """
    check_parameter("rank", rank)
    check_parameter("alpha", alpha)
    if seed is not None:
        torch.manual_seed(seed)
    model = pretrained.load_base(study, class_names, base_precision)
    if model.replaced_classes:
        print(
            f"the base's head, for {model.replaced_classes} classes, "
            f"is replaced by a new one for {len(class_names)}"
        )
    head = layers.head_name(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=study.finetune.dropout if dropout is None else dropout,
        bias="none",
        target_modules=find_targets(model, targets),
        modules_to_save=[head],
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return get_peft_model(model, config)


def count_trained(model: PeftModel) -> dict[str, int]:
    """Count the parameters that are trained.

    Returns:
        Parameters of the adapters, of the head, and of all the model; linears is the
        number of Linears with an adapter.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    adapters = sum(size for name, size in sizes.items() if "lora_" in name)
    linears = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {
        "adapters": adapters,
        "head": sum(sizes.values()) - adapters,
        "all": model.get_nb_trainable_parameters()[1],
        "linears": len(linears),
    }


def merge_adapters(model: PeftModel, study: Study, class_names: list[str]) -> nn.Module:
    """Return the base in full precision with the adapters added to its weights.

    Adapters that were trained on a quantized base (QLoRA) are merged into the base in
    full precision, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = pretrained.load_base(study, class_names)
        return PeftModel.from_pretrained(base, folder).merge_and_unload().eval()


def check_request(study: Study, targets: str = "all") -> None:
    """Check what would end a training after hours, before anything is computed.

    Raises:
        UserError: a target that the base lacks, or checkpoints that cannot be written
            (see ``files.check_new_folder``).
    """
    check_new_folder(study.outputs / "checkpoints", **_export_options(study))
    if targets != "all":
        find_targets(pretrained.load_base(study, ["one", "other"]), targets)


def _export_options(study: Study) -> dict:
    base = Path(pretrained.find_base(study))  # a folder, or a name on the hub
    return {
        "what": export.CHECKPOINTS,
        "reads": [base] if base.is_dir() else [],
        "is_own": export.is_checkpoints,
    }


def _keep_plans(final: Path, part: Path) -> list[str]:
    """Keep the checkpoints of plans in the new folder, and return their names.

    They are of another model now, which the loader refuses. Their files are shared with
    the old folder where the file system can: it is deleted only afterwards.
    """
    plans = sorted(path for path in final.glob("plan-*") if path.is_dir())
    for path in plans:
        shutil.copytree(path, part / path.name, copy_function=_link_or_copy)
    return [path.name.removeprefix("plan-") for path in plans]


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def export_checkpoints(
    model: PeftModel,
    study: Study,
    processor,
    class_names: list[str],
    keep: Path | None = None,
) -> dict[str, int]:
    """Write the checkpoints merged (fp32), nf4 and int8, all three or none.

    They replace those of the fine-tuning before. Checkpoints of its plans are kept.
    Each holds weights (safetensors), class names and preprocessing, and loads with
    plain transformers.

    Args:
        keep: the folder to keep the earlier checkpoints in, see ``Run.earlier``; None:
            they are deleted.

    Returns:
        The bytes of each checkpoint on disk.
    """
    final = study.outputs / "checkpoints"
    with new_folder(final, **_export_options(study), keep=keep) as part:
        merged = merge_adapters(model, study, class_names)
        # A name that transformers knows without this package.
        merged.set_attn_implementation("sdpa")
        merged.save_pretrained(part / "merged")
        skip = quantization.modules_to_skip(merged)
        for weights in ("nf4", "int8"):
            export.save_quantized(part / "merged", part / weights, weights, skip)
        for name in export.EXPORTS:
            processor.save_pretrained(part / name)
        kept = _keep_plans(final, part)
    if kept:
        print(
            f"kept from the fine-tuning before, of another model: {', '.join(kept)}: "
            f"make them again with 'python -m vitnb plan {study.typed}'",
            flush=True,
        )
    return {name: checkpoints.disk_bytes(final / name) for name in export.EXPORTS}
