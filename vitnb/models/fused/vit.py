"""The forward of a ViT, rearranged: the same numbers in fewer and larger steps over memory.

What changes, each a technique that can be left out (the waterfall figure shows what each one is worth):

- ``patches``: the patch convolution, whose patches do not overlap, is a copy and a product.
- ``qkv``: query, key and value are one product; their weights stand one below the other.
- ``stream``: what a block adds to the residual stream is added by the product itself. The biases, which cuBLAS cannot add
  there as well, are summed up and added where the stream is read, by the next layer norm.
- ``norm``: residual and layer norm in one pass, by a kernel of our own.
- ``gelu``: the exact GELU in place, by a kernel of our own.
- ``class token``: in the last block only the class token is computed behind the attention: nothing else is read.
- ``one pass`` (NF4): the weights of a block are unpacked by one kernel in two launches, into a scratch that all blocks share.
"""

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from vitnb.errors import VariantError
from vitnb.models import attention
from vitnb.models.fused import linears, operations, reference
from vitnb.models.quantization import Float8Linear

TECHNIQUES = ("one pass", "patches", "qkv", "stream", "norm", "gelu", "class token")


class Block(nn.Module):
    """The weights of one block; see ``FusedViT.forward`` for what is done with them."""

    def __init__(self, layer, dtype: torch.dtype, scratch: torch.Tensor | None, techniques: frozenset[str]):
        super().__init__()
        own, mlp = layer.attention, layer.mlp
        several = [own.q_proj, own.k_proj, own.v_proj]
        groups = [several] if "qkv" in techniques else [[one] for one in several]
        first, second = [*groups, [own.o_proj], [mlp.fc1]], [[mlp.fc2]]
        products, self.packs = [], nn.ModuleList()
        for stage in (first, second):  # of NF4: the second is unpacked over the first
            places = linears.places(scratch, stage)
            products += [linears.dense(group, dtype, place) for group, place in zip(stage, places, strict=True)]
            if scratch is not None:
                self.packs.append(linears.pack([one for group in stage for one in group], "one pass" in techniques))
        *qkv, self.out, self.fc1, self.fc2 = products
        self.qkv = nn.ModuleList(qkv)
        for name, norm in (("before", layer.layernorm_before), ("after", layer.layernorm_after)):
            self.register_buffer(f"{name}_weight", norm.weight.data)
            self.register_buffer(f"{name}_bias", norm.bias.data)
        # float32 sums over all earlier blocks, filled by FusedViT: what the stream lacks at either norm.
        self.register_buffer("before_shift", None)
        self.register_buffer("after_shift", None)


class FusedViT(nn.Module):
    """A ``ViTForImageClassification`` of transformers as it computes with this engine; same call, same logits.

    Takes the weights over: the model that was given cannot be used any more. Raises VariantError for another architecture
    and for int8, which is quantized within bitsandbytes' own product.
    """

    def __init__(self, model: nn.Module, launched: str, dtype: torch.dtype, techniques: frozenset[str] | None = None):
        super().__init__()
        if not isinstance(model, ViTForImageClassification):
            raise VariantError(f"the fused engine knows ViT, and this is {type(model).__name__}: use the engine graph")
        config = model.config
        if config.hidden_act != "gelu":
            raise VariantError(
                f"the fused engine has the exact GELU alone, not {config.hidden_act}: use the engine graph"
            )
        linear = model.vit.layers[0].mlp.fc1
        if isinstance(linear, bnb.nn.Linear8bitLt):
            raise VariantError("the fused engine has no int8 of bitsandbytes: use fp8, or the engine graph")
        self.config, self.launched, self.dtype = config, launched, dtype
        self.techniques = frozenset(TECHNIQUES) if techniques is None else techniques
        self.eps, self.heads = config.layer_norm_eps, config.num_attention_heads
        # PyTorch's float8 product has no operand to add to.
        self.adds_in_product = "stream" in self.techniques and not isinstance(linear, Float8Linear)
        device = model.classifier.weight.device
        of = {True: operations(device), False: reference}
        self.norm, self.gelu = (of[name in self.techniques] for name in ("norm", "gelu"))
        self.unpacker = of["one pass" in self.techniques]

        embeddings = model.vit.embeddings
        self.projection = embeddings.patch_embeddings.projection
        self.register_buffer("positions", embeddings.position_embeddings.data[0])
        self.register_buffer("class_token", embeddings.cls_token.data[0])
        scratch = None
        if isinstance(linear, bnb.nn.Linear4bit):
            # qkv, out and fc1 of a block together; then fc2 in their place.
            layer = model.vit.layers[0]
            together = [*layer.attention.children(), layer.mlp.fc1]
            size = sum(m.in_features * m.out_features for m in together if isinstance(m, nn.Linear))
            scratch = torch.empty(size, dtype=dtype, device=device)
        self.scratch = scratch  # no buffer: it holds no weights, and is counted apart
        self.blocks = nn.ModuleList()
        while len(model.vit.layers):  # one at a time, so that no two copies of all weights stand side by side
            self.blocks.append(Block(model.vit.layers[0], dtype, scratch, self.techniques))
            del model.vit.layers[0]
        self.register_buffer("last_shift", None)
        if self.adds_in_product:
            self._sum_biases()
        self.layernorm, self.classifier = model.vit.layernorm, model.classifier

    def _sum_biases(self) -> None:
        lacking = torch.zeros(self.config.hidden_size, device=self.positions.device)
        for block in self.blocks:
            block.before_shift = lacking.clone()
            lacking = lacking if block.out.bias is None else lacking + block.out.bias.float()
            block.after_shift = lacking.clone()
            lacking = lacking if block.fc2.bias is None else lacking + block.fc2.bias.float()
            block.out.bias = block.fc2.bias = None
        self.last_shift = lacking

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] -> the stream [batch, tokens, hidden], class token first."""
        if "patches" in self.techniques:
            side, columns = self.projection.kernel_size[0], pixels.shape[-1] // self.projection.kernel_size[0]
            patches = pixels.unflatten(3, (columns, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
            weight = self.projection.weight.flatten(1)
            tokens = nn.functional.linear(patches.reshape(-1, weight.shape[1]), weight, self.projection.bias)
            tokens = tokens.view(len(pixels), -1, len(weight))
        else:
            tokens = self.projection(pixels).flatten(2).transpose(1, 2)
        stream = tokens.new_empty(len(pixels), len(self.positions), tokens.shape[-1])
        torch.add(tokens, self.positions[1:], out=stream[:, 1:])
        stream[:, 0] = self.class_token + self.positions[:1]
        return stream

    def _attend(self, block: Block, x, batch: int) -> torch.Tensor:
        """What the attention of a block reads, [batch x tokens, hidden], to what its last product reads."""
        if len(block.qkv) == 1:
            several = block.qkv[0](x).view(batch, -1, 3, self.heads, self.head_size)
            query, key, value = (several[:, :, i].transpose(1, 2) for i in range(3))
        else:
            query, key, value = (
                one(x).view(batch, -1, self.heads, self.head_size).transpose(1, 2) for one in block.qkv
            )
        function = attention.FUNCTIONS[attention.implementation(self.launched)]
        return function(None, query, key, value, None)[0].flatten(2)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the memory that NF4 weights are unpacked into, which all blocks share."""
        return 0 if self.scratch is None else self.scratch.numel() * self.scratch.element_size()

    def flops_left_out(self, batch: int) -> int:
        """Operations of the whole model's forward that this one does not do: those of the last block's other tokens."""
        if "class token" not in self.techniques:
            return 0
        hidden = self.config.hidden_size
        return 2 * batch * (len(self.positions) - 1) * hidden * (hidden + 2 * self.config.intermediate_size)

    @property
    def head_size(self) -> int:
        return self.config.hidden_size // self.heads

    def _add(self, product, stream: torch.Tensor, x) -> torch.Tensor | None:
        """Add a product's result to the stream, or give back what the next norm is to add."""
        if self.adds_in_product:
            return product.add_to(stream, x)
        return product(x)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Pixels, [batch, 3, height, width], to logits [batch, classes]."""
        batch = len(pixel_values)
        stream, delta = self._embed(pixel_values).flatten(0, 1), None
        for block in self.blocks:
            if self.scratch is not None:
                linears.unpack(block.packs[0], self.unpacker, self.scratch)
            x = self.norm.layer_norm(
                stream, delta, block.before_shift, block.before_weight, block.before_bias, self.eps, block.out.fp8
            )
            x = self._attend(block, x, batch)
            if block is self.blocks[-1] and "class token" in self.techniques:
                x, stream = x[:, 0], stream.view(batch, -1, stream.shape[-1])[:, 0].contiguous()
            x = x.reshape(-1, x.shape[-1])
            delta = self._add(block.out, stream, self.norm.quantize_rows(x) if block.out.fp8 else x)
            x = self.norm.layer_norm(
                stream, delta, block.after_shift, block.after_weight, block.after_bias, self.eps, block.out.fp8
            )
            x = self.gelu.gelu(block.fc1(x), block.out.fp8)
            if self.scratch is not None:
                linears.unpack(block.packs[1], self.unpacker, self.scratch)
            delta = self._add(block.fc2, stream, x)
        if len(stream) != batch:  # of the last norm only the class token is read, whatever the techniques
            tokens = len(stream) // batch
            stream, delta = (None if t is None else t[::tokens].contiguous() for t in (stream, delta))
        x = self.norm.layer_norm(stream, delta, self.last_shift, self.layernorm.weight, self.layernorm.bias, self.eps)
        return ImageClassifierOutput(logits=self.classifier(x))
