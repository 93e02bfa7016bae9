"""The rearranged forward of a ViT: fewer launches and fewer passes over memory.

The logits stay the same. Each change is a technique that can be left out, and the
waterfall figure shows its gain:

- ``patches``: the patch convolution becomes a copy and a product, as its patches do not
  overlap.
- ``qkv``: query, key and value are one product, with their weights joined.
- ``stream``: a product adds its result to the residual stream itself. cuBLAS cannot add
  a bias in the same step. So biases are summed beforehand, and each layer norm adds the
  sum of all biases that its input lacks.
- ``norm``: one kernel of our own adds the residual and computes the layer norm.
- ``gelu``: one kernel of our own computes the exact GELU in place.
- ``class token``: behind the attention of the last block only the class token is
  computed, as nothing else is read.
- ``one pass`` (NF4): one kernel unpacks the weights of a block in two launches, into a
  scratch that all blocks share.
"""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from vitnb.errors import VariantError
from vitnb.models import attention
from vitnb.models.fused import describe_operations, linears, operations, reference
from vitnb.models.quantization import Float8Linear

TECHNIQUES = ("one pass", "patches", "qkv", "stream", "norm", "gelu", "class token")


class Block(nn.Module):
    """The weights of one transformer block; ``FusedViT`` computes with them.

    Args:
        layer: the block of transformers, which gives its weights away.
        dtype: the type that the model computes in.
        scratch: where NF4 weights are unpacked; None for other weights.
        techniques: those to use.
        dequantize: see ``linears.pack_nf4``.
    """

    def __init__(
        self,
        layer: nn.Module,
        dtype: torch.dtype,
        scratch: torch.Tensor | None,
        techniques: frozenset[str],
        dequantize: Callable | None,
    ):
        super().__init__()
        own, mlp = layer.attention, layer.mlp
        groups = [[own.q_proj], [own.k_proj], [own.v_proj]]
        if "qkv" in techniques:
            groups = [[own.q_proj, own.k_proj, own.v_proj]]
        products = []
        self.packs = nn.ModuleList()
        # NF4 weights of the second stage are unpacked over those of the first.
        for stage in ([*groups, [own.o_proj], [mlp.fc1]], [[mlp.fc2]]):
            places = linears.divide_scratch(scratch, stage)
            for group, place in zip(stage, places, strict=True):
                products.append(linears.join_products(group, dtype, place))
            if scratch is not None:
                every_linear = [linear for group in stage for linear in group]
                self.packs.append(linears.pack_nf4(every_linear, dequantize))
        *qkv, self.out, self.fc1, self.fc2 = products
        self.qkv = nn.ModuleList(qkv)
        self.register_buffer("before_weight", layer.layernorm_before.weight.data)
        self.register_buffer("before_bias", layer.layernorm_before.bias.data)
        self.register_buffer("after_weight", layer.layernorm_after.weight.data)
        self.register_buffer("after_bias", layer.layernorm_after.bias.data)
        # The biases that the stream lacks at either norm, float32 [hidden], summed over
        # all earlier blocks. FusedViT fills them in.
        self.register_buffer("before_shift", None)
        self.register_buffer("after_shift", None)


class FusedViT(nn.Module):
    """A ``ViTForImageClassification`` of transformers with the rearranged forward.

    Call and logits are those of transformers. The given model loses its weights and
    cannot be used any more.

    Args:
        model: a ViT with plain, NF4 or float8 Linears.
        backend: the attention backend, a key of ``attention.ALLOWED``.
        dtype: the type that the model computes in.
        techniques: those to use, all by default.

    Attributes:
        ran: ``fused``, and what computes its operations if not Triton's kernels.
        reason: why not; empty if they do.

    Raises:
        VariantError: another architecture or activation, or int8, which bitsandbytes
            quantizes within its own product.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: str,
        dtype: torch.dtype,
        techniques: frozenset[str] | None = None,
    ):
        super().__init__()
        _check_supported(model)
        if techniques is None:
            techniques = frozenset(TECHNIQUES)
        self.config = model.config
        self.eps = model.config.layer_norm_eps
        self.heads = model.config.num_attention_heads
        self.backend = backend
        self.dtype = dtype
        self.techniques = techniques
        device = model.classifier.weight.device
        own = operations(device)
        stand_in, self.reason = describe_operations(device)
        self.ran = ", ".join(filter(None, ["fused", stand_in]))
        norm = own if "norm" in techniques else reference
        self.layer_norm = norm.layer_norm
        self.quantize_rows = norm.quantize_rows
        self.gelu = own.gelu if "gelu" in techniques else reference.gelu
        dequantize = own.dequantize_nf4 if "one pass" in techniques else None
        # PyTorch's float8 product has no operand to add to.
        is_float8 = isinstance(model.vit.layers[0].mlp.fc1, Float8Linear)
        self.adds_in_product = "stream" in techniques and not is_float8

        embeddings = model.vit.embeddings
        self.projection = embeddings.patch_embeddings.projection
        self.register_buffer("positions", embeddings.position_embeddings.data[0])
        self.register_buffer("class_token", embeddings.cls_token.data[0])
        # No buffer: a scratch holds no weights, and is counted apart.
        self.scratch = _make_scratch(model.vit.layers[0], dtype)
        self.blocks = nn.ModuleList()
        # One block at a time, so that all weights never stand in memory twice.
        while len(model.vit.layers):
            layer = model.vit.layers[0]
            self.blocks.append(
                Block(layer, dtype, self.scratch, techniques, dequantize)
            )
            del model.vit.layers[0]
        self.register_buffer("last_shift", None)
        if self.adds_in_product:
            self._sum_biases()
        self.layernorm = model.vit.layernorm
        self.classifier = model.classifier

    def _sum_biases(self) -> None:
        """Move biases from the products to the layer norms that read their results."""
        shift = torch.zeros(self.config.hidden_size, device=self.positions.device)
        for block in self.blocks:
            block.before_shift = shift.clone()
            if block.out.bias is not None:
                shift = shift + block.out.bias.float()
            block.after_shift = shift.clone()
            if block.fc2.bias is not None:
                shift = shift + block.fc2.bias.float()
            block.out.bias = None
            block.fc2.bias = None
        self.last_shift = shift

    @property
    def head_size(self) -> int:
        """The numbers of a query, key or value in one attention head."""
        return self.config.hidden_size // self.heads

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the memory that NF4 weights are unpacked into."""
        if self.scratch is None:
            return 0
        return self.scratch.numel() * self.scratch.element_size()

    def flops_left_out(self, batch: int) -> int:
        """Return the operations of the whole model's forward that are not done.

        They belong to the last block's tokens other than the class token.
        """
        if "class token" not in self.techniques:
            return 0
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        tokens = len(self.positions) - 1
        return 2 * batch * tokens * hidden * (hidden + 2 * inner)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Map pixels [batch, 3, height, width] to logits [batch, classes]."""
        batch = len(pixel_values)
        stream = self._embed(pixel_values).flatten(0, 1)
        delta = None  # a result that the next norm adds to the stream
        for block in self.blocks:
            stream, delta = self._run_block(block, stream, delta, batch)
        if len(stream) != batch:
            # The last norm reads only the class token, whatever the techniques.
            tokens = len(stream) // batch
            stream = stream[::tokens].contiguous()
            delta = None if delta is None else delta[::tokens].contiguous()
        last = self.layernorm
        x = self.layer_norm(
            stream, delta, self.last_shift, last.weight, last.bias, self.eps
        )
        return ImageClassifierOutput(logits=self.classifier(x))

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels to the stream [batch, tokens, hidden], class token first."""
        if "patches" in self.techniques:
            tokens = self._project_patches(pixels)
        else:
            tokens = self.projection(pixels).flatten(2).transpose(1, 2)
        size = (len(pixels), len(self.positions), tokens.shape[-1])
        stream = tokens.new_empty(size)
        torch.add(tokens, self.positions[1:], out=stream[:, 1:])
        stream[:, 0] = self.class_token + self.positions[:1]
        return stream

    def _project_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map pixels to [batch, patches, hidden], by a copy and a product."""
        side = self.projection.kernel_size[0]
        columns = pixels.shape[-1] // side
        # [batch, 3, height, width] -> [batch, 3, rows, side, columns, side]
        patches = pixels.unflatten(3, (columns, side)).unflatten(2, (-1, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        weight = self.projection.weight.flatten(1)
        tokens = nn.functional.linear(
            patches.reshape(-1, weight.shape[1]), weight, self.projection.bias
        )
        return tokens.view(len(pixels), -1, len(weight))

    def _run_block(
        self,
        block: Block,
        stream: torch.Tensor,
        delta: torch.Tensor | None,
        batch: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one block on the stream [batch x tokens, hidden].

        Returns:
            The stream, with the class tokens alone after the last block, and what the
            next norm is to add to the stream, if anything.
        """
        fp8 = block.out.fp8
        if self.scratch is not None:
            linears.unpack_nf4(block.packs[0], self.scratch)
        x = self.layer_norm(
            stream,
            delta,
            block.before_shift,
            block.before_weight,
            block.before_bias,
            self.eps,
            fp8,
        )
        x = self._attend(block, x, batch)
        if block is self.blocks[-1] and "class token" in self.techniques:
            x = x[:, 0]
            stream = stream.view(batch, -1, stream.shape[-1])[:, 0].contiguous()
        x = x.reshape(-1, x.shape[-1])
        delta = self._add(block.out, stream, self.quantize_rows(x) if fp8 else x)
        x = self.layer_norm(
            stream,
            delta,
            block.after_shift,
            block.after_weight,
            block.after_bias,
            self.eps,
            fp8,
        )
        x = self.gelu(block.fc1(x), fp8)
        if self.scratch is not None:
            linears.unpack_nf4(block.packs[1], self.scratch)
        return stream, self._add(block.fc2, stream, x)

    def _attend(self, block: Block, x, batch: int) -> torch.Tensor:
        """Map a block's normalized stream to its attention, [batch, tokens, hidden]."""
        if len(block.qkv) == 1:
            joined = block.qkv[0](x).view(batch, -1, 3, self.heads, self.head_size)
            parts = joined.unbind(2)
        else:
            size = (batch, -1, self.heads, self.head_size)
            parts = [product(x).view(size) for product in block.qkv]
        query, key, value = (part.transpose(1, 2) for part in parts)
        function = attention.FUNCTIONS[attention.implementation(self.backend)]
        return function(None, query, key, value, None)[0].flatten(2)

    def _add(self, product, stream: torch.Tensor, x) -> torch.Tensor | None:
        """Add a product to the stream, or return it for the next norm to add."""
        if self.adds_in_product:
            product.add_to(stream, x)
            return None
        return product(x)


def _check_supported(model: nn.Module) -> None:
    """Raise VariantError if the rearranged forward cannot compute a model."""
    if not isinstance(model, ViTForImageClassification):
        raise VariantError(
            f"the fused engine knows ViT, and this is {type(model).__name__}: "
            "use the engine graph"
        )
    activation = model.config.hidden_act
    if activation != "gelu":
        raise VariantError(
            f"the fused engine has the exact GELU alone, not {activation}: "
            "use the engine graph"
        )
    if isinstance(model.vit.layers[0].mlp.fc1, bnb.nn.Linear8bitLt):
        raise VariantError(
            "the fused engine has no int8 of bitsandbytes: use fp8, or the engine graph"
        )


def _make_scratch(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor | None:
    """Return memory for the unpacked weights of an NF4 block; None for other weights.

    It holds q, k, v, out and fc1 of a block together. fc2 then takes their place.
    """
    if not isinstance(layer.mlp.fc1, bnb.nn.Linear4bit):
        return None
    parts = [*layer.attention.children(), layer.mlp.fc1]
    size = sum(
        part.in_features * part.out_features
        for part in parts
        if isinstance(part, nn.Linear)
    )
    return torch.empty(size, dtype=dtype, device=layer.mlp.fc1.weight.device)
