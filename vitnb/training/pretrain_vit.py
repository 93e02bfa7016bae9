"""The ViT that is pretrained: built, compiled for the device, and saved as a base without a classifier.

Patch dropout: a Vision Transformer that sees a random part of an image's patches costs that part of the time.

Y. Liu et al., *PatchDropout*, WACV 2023, arXiv:2208.07220. The class token is always kept. Patches get their positions
before some are dropped, so those that stay know where they were, and attention needs no mask.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from vitnb.data import garden
from vitnb.errors import one_line
from vitnb.models import attention
from vitnb.study import Pretrain


def build_vit(asked: Pretrain) -> ViTForImageClassification:
    """The untrained model, in float32.

    Each block adds to a stream, and many blocks of random weights add noise. With `residual_scale` 0 the Linears that
    write to the stream start at zero, so that every block starts as the identity and a deep model learns from the first
    step (SkipInit, arXiv:2002.10444; Fixup, arXiv:1901.09321).
    """
    config = ViTConfig(
        image_size=asked.image_size, patch_size=asked.patch_size, hidden_size=asked.hidden_size,
        num_hidden_layers=asked.layers, num_attention_heads=asked.heads, intermediate_size=4 * asked.hidden_size,
        qkv_bias=True, num_labels=garden.PRETRAINING_SPECIES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    model.set_attn_implementation(attention.implementation("sdpa"))  # without a mask, which shuts flash kernels out
    with torch.no_grad():
        for layer in model.vit.layers:
            for last in (layer.attention.o_proj, layer.mlp.fc2):
                last.weight.mul_(asked.residual_scale)
    return model


def compile_layers(model: ViTForImageClassification, batch_size: int, kept: int | None, backend="inductor") -> None:
    """Compile each block of the model in place, tried once forward and backward; eager as before where that fails.

    The blocks are alike, so one compilation serves them all, in the time of one.
    """
    size, on = model.config.image_size, model.device
    try:
        for layer in model.vit.layers:
            layer.compile(dynamic=False, backend=backend)
        part = None if kept is None else torch.arange(kept, device=on).expand(batch_size, kept)
        with torch.autocast(on.type, torch.bfloat16):
            forward_subset(model, torch.zeros(batch_size, 3, size, size, device=on), part).float().sum().backward()
    except Exception as error:  # whatever a compiler may raise: eager is only slower
        print(f"torch.compile failed ({one_line(error)}): eager", flush=True)
        for layer in model.vit.layers:
            layer._compiled_call_impl = None
    model.zero_grad(set_to_none=True)


def save_base(model: ViTForImageClassification, card: str, out: Path) -> None:
    """Write the fp16 backbone, the preprocessor and the card to the folder `out`, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        backbone = {name: value.detach().cpu().half().contiguous() for name, value in model.state_dict().items()
                    if not name.startswith("classifier.")}  # fmt: skip
        # The 800 labels go with the head, which is left out. The config says float32: fp16 is how it is stored.
        model.config.num_labels = 2
        model.set_attn_implementation("sdpa")  # a name that transformers knows without this package
        model.save_pretrained(draft, state_dict=backbone)
        side = model.config.image_size
        processor = ViTImageProcessorPil(
            do_resize=True, size={"height": side, "width": side}, do_rescale=True, rescale_factor=1 / 255,
            do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip
        processor.save_pretrained(draft)
        (draft / "README.md").write_text(card)
        for path in (draft, *draft.iterdir()):  # mkdtemp and safetensors write for the owner only
            path.chmod(0o755 if path.is_dir() else 0o644)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def num_kept(model: ViTForImageClassification, share: float) -> int:
    """How many of an image's patches make up `share`, 0 to 1: at least one."""
    return max(1, round(share * model.vit.embeddings.patch_embeddings.num_patches))


def sample_patches(images: int, patches: int, kept: int, generator: torch.Generator) -> Tensor:
    """`kept` of the numbers 0 to `patches` - 1, each at most once, for every image anew: int64 [images, kept]."""
    luck = torch.rand(images, patches, generator=generator, device=generator.device)
    return luck.topk(kept, sorted=False).indices


def forward_subset(model: ViTForImageClassification, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
    """The logits [n, classes] of `pixels` [n, 3, height, width] from the class token and the patches `kept` alone.

    `kept` is int64 [n, k], patches in reading order from 0; None for all, which is the model's own forward.
    """
    hidden = model.vit.embeddings(pixels)
    if kept is not None:
        index = torch.nn.functional.pad(kept + 1, (1, 0))  # the class token is number 0
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    for layer in model.vit.layers:
        hidden = layer(hidden)
    return model.classifier(model.vit.layernorm(hidden[:, 0]))
