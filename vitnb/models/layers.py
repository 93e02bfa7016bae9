"""The layers of a model: its Linears, its classification head, its transformer blocks.

All names are read from the model's modules, so that any family of ViT works.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vitnb.errors import UserError


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every Linear by its full name.

    Quantized Linears are included: their classes derive from ``nn.Linear``.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def head_name(model: nn.Module) -> str:
    """Return the full name of the classification head, the last Linear.

    Raises:
        UserError: the last Linear does not give one number for each class.
    """
    name, module = list(linears(model).items())[-1]
    if module.out_features != model.config.num_labels:
        raise UserError(
            f"no classification head: the last Linear, {name}, gives "
            f"{module.out_features} numbers for {model.config.num_labels} classes"
        )
    return name


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every Linear but the head by its full name."""
    head = head_name(model)
    return {name: module for name, module in linears(model).items() if name != head}


def transformer_blocks(model: nn.Module) -> list[str]:
    """Return the full names of the transformer blocks, first to last.

    A block is an element of an ``nn.ModuleList``. It holds Linears and a normalization,
    and no other block. So Swin's stages are no blocks, because they hold blocks. Heads
    or experts in a list of their own are no blocks, because they hold no normalization.

    Raises:
        UserError: the model has no blocks.
    """
    candidates = [
        f"{name}.{i}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for i, element in enumerate(module)
        if _has_linears_and_norm(element)
    ]
    blocks = [
        name
        for name in candidates
        if not any(other.startswith(f"{name}.") for other in candidates)
    ]
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no transformer blocks: "
            "take a base of the ViT family"
        )
    return blocks


def _has_linears_and_norm(module: nn.Module) -> bool:
    """Tell whether a module holds Linears and a normalization."""
    norms = (nn.LayerNorm, nn.RMSNorm)
    has_norm = any(isinstance(part, norms) for part in module.modules())
    return has_norm and bool(linears(module))


def linear_kinds(model: nn.Module) -> dict[str, list[str]]:
    """Return the full names of the Linears of each kind, block by block.

    The kinds of a ViT are ``q``, ``k``, ``v``, ``o``, ``fc1`` and ``fc2``. A kind is
    named by the last part of its path in the block, without ``_proj``. Where two
    Linears of a block share that part, the kind is named by the whole path.
    """
    kinds: dict[str, list[str]] = {}
    for block in transformer_blocks(model):
        paths = list(linears(model.get_submodule(block)))
        short = [path.rpartition(".")[2].removesuffix("_proj") for path in paths]
        for path, name in zip(paths, short, strict=True):
            kind = name if short.count(name) == 1 else path
            kinds.setdefault(kind, []).append(f"{block}.{path}")
    return kinds


@contextmanager
def collect_features(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of the classification head while a block of forwards runs.

    Yields:
        A list that gains float32 [batch, hidden] on the CPU at each forward.
    """
    features: list[torch.Tensor] = []

    def keep_input(_, inputs: tuple[torch.Tensor, ...]) -> None:
        features.append(inputs[0].float().cpu())

    head = model.get_submodule(head_name(model))
    hook = head.register_forward_pre_hook(keep_input)
    try:
        yield features
    finally:
        hook.remove()
