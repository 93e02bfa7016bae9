"""Fine-tuning: LoRA (arXiv:2106.09685) or QLoRA (arXiv:2305.14314) with a trained head, and the three exports.

Only the adapters and the head are trained (see ``training``). The head must be: a new one that stays frozen gives chance.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from vitnb.errors import UserError, suggest
from vitnb.models import checkpoints, export, layers, pretrained, quantization
from vitnb.records.files import new_folder
from vitnb.study import Study


def targets(model: nn.Module, asked: str) -> list[str]:
    """Full names of the Linears that get an adapter.

    ``asked``: ``all`` (every Linear but the head), or names separated by commas, each a part of the path of some
    Linears: ``attention``, ``mlp``, ``q_proj``, ``fc1`` ... Raises UserError for one that matches none.
    """
    names = list(layers.quantizable(model))
    if asked == "all":
        return names
    chosen = set()
    for part in asked.replace(" ", "").split(","):
        matched = {name for name in names if part in name.split(".")}
        if not matched:
            known = ["all", *dict.fromkeys(p for name in names for p in name.split(".") if not p.isdigit())]
            raise UserError(f"targets: no Linear is called '{part}': {suggest(part, known)}")
        chosen |= matched
    return [name for name in names if name in chosen]


def add_adapters(
    study: Study,
    class_names: list[str],
    *,
    rank=8,
    alpha=32,
    dropout=None,
    target="all",
    base_precision="fp32",
    gradient_checkpointing=False,
    seed=None,
) -> PeftModel:
    """The study's base with LoRA adapters and a fresh head that is trained with them.

    Args:
        rank, alpha: of the adapters, whose product is scaled by alpha / rank.
        dropout: before the adapters; None for ``study.finetune.dropout``.
        target: which Linears get one, see ``targets``.
        base_precision: ``fp32`` (LoRA), ``nf4`` or ``int8`` (QLoRA: the frozen base is quantized while training).
        gradient_checkpointing: trade time for memory by computing activations twice.
        seed: of adapters and head, and of what dropout draws afterwards, whatever was drawn before; None: PyTorch's generators
            as they are.
    """
    if rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    if seed is not None:
        torch.manual_seed(seed)
    model = pretrained.load_base(study, class_names, base_precision)
    if model.replaced_classes:
        print(f"the base's head, for {model.replaced_classes} classes, is replaced by a new one for {len(class_names)}")
    head, chosen = layers.head_name(model), targets(model, target)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=study.finetune.dropout if dropout is None else dropout,
        bias="none",
        target_modules=chosen,
        modules_to_save=[head],
    )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, config)


def count_trained(model: nn.Module) -> dict[str, int]:
    """How many parameters are trained, in the adapters and in the head, and how many there are; and linears: Linears with an adapter."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    adapters = sum(size for name, size in sizes.items() if "lora_" in name)
    return {
        "adapters": adapters, "head": sum(sizes.values()) - adapters, "all": model.get_nb_trainable_parameters()[1],
        "linears": sum(isinstance(module, LoraLayer) for module in model.modules()),
    }  # fmt: skip


def merge_adapters(model: PeftModel, study: Study, class_names: list[str]) -> nn.Module:
    """Fold the adapters into the full-precision base, also those that were trained on a quantized one (QLoRA)."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = pretrained.load_base(study, class_names)
        return PeftModel.from_pretrained(base, folder).merge_and_unload().eval()


def export_checkpoints(model: PeftModel, study: Study, processor, class_names: list[str]) -> dict[str, int]:
    """Write ``checkpoints/merged`` (fp32), ``nf4`` and ``int8``, all three or none; return their bytes on disk.

    Each holds weights (safetensors), class names and preprocessing, and loads with plain transformers.
    """
    final = study.outputs / "checkpoints"
    with new_folder(final) as part:
        merged = merge_adapters(model, study, class_names)
        merged.set_attn_implementation("sdpa")  # a name that transformers knows without this package
        merged.save_pretrained(part / "merged")
        for weights in ("nf4", "int8"):
            export.save_quantized(part / "merged", part / weights, weights, quantization.modules_to_skip(merged))
        for name in export.EXPORTS:
            processor.save_pretrained(part / name)
    return {name: checkpoints.disk_bytes(final / name) for name in export.EXPORTS}
