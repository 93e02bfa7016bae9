"""The transformer blocks of a model, and the kinds of Linears in them: read from its modules, so that any family of ViT will do."""

from torch import nn

from vitnb.errors import UserError


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear of a model by its full name, quantized ones included (they are Linears too)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def head_name(model: nn.Module) -> str:
    """The name of the classification head: the last Linear, which gives one number for each class."""
    name, module = list(linears(model).items())[-1]
    if module.out_features != model.config.num_labels:
        raise UserError(
            f"no classification head: the last Linear, {name}, gives {module.out_features} numbers "
            f"for {model.config.num_labels} classes"
        )
    return name


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Every Linear but the head by its full name."""
    kept = head_name(model)
    return {name: module for name, module in linears(model).items() if name != kept}


def transformer_blocks(model: nn.Module) -> list[str]:
    """Full names of the transformer blocks, first to last, whatever the family calls them and however it stages them.

    A block is an element of a list of modules that holds Linears and a normalization, and no such element itself: Swin's stages
    hold blocks and are none; heads or experts in a list of their own bring no normalization along. UserError if there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [f"{name}.{i}" for name, several in lists.items() for i, one in enumerate(several) if _normalized(one)]
    blocks = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    if not blocks:
        raise UserError(f"{type(model).__name__} has no transformer blocks: take a base of the ViT family")
    return blocks


def _normalized(module: nn.Module) -> bool:
    """Whether a module holds Linears and a normalization."""
    norms = [one for one in module.modules() if isinstance(one, (nn.LayerNorm, nn.RMSNorm))]
    return bool(norms and linears(module))


def linear_kinds(model: nn.Module) -> dict[str, list[str]]:
    """Full names of the Linears of each kind, block by block: ``q``, ``k``, ``v``, ``o``, ``fc1``, ``fc2`` in a ViT.

    A kind is called by the last part of its path in the block without ``_proj``, or by the whole path where two share it.
    """
    found: dict[str, list[str]] = {}
    for block in transformer_blocks(model):
        paths = list(linears(model.get_submodule(block)))
        last = [path.rpartition(".")[2].removesuffix("_proj") for path in paths]
        for path, name in zip(paths, last, strict=True):
            found.setdefault(name if last.count(name) == 1 else path, []).append(f"{block}.{path}")
    return found
