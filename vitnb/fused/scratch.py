"""The scratch: where the NF4 weights of one block after the other stand, unpacked, while their products read them.

The weights around the attention come first (query, key, value, output), and behind the attention the MLP's second weight takes
their place; beside them is the place of the MLP's first. So either weight of the MLP can be unpacked while another product reads
the other part, on a stream of its own: for a few images these products leave much of a GPU idle.
"""

from collections.abc import Sequence

import torch
from torch import nn

from vitnb.fused import operations, reference, weights

AROUND_ATTENTION, FIRST, SECOND = range(3)


class Scratch:
    """Memory for one block, and what is unpacked into it when.

    Args:
        layer: a ViT layer of transformers, as large as any.
        techniques: of the fused engine. Without ``beside`` all is unpacked in the products' own stream, right before them.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype, techniques: frozenset[str]):
        own, mlp = layer.attention, layer.mlp
        around, first, second = (
            sum(one.in_features * one.out_features for one in linears)
            for linears in ([own.q_proj, own.k_proj, own.v_proj, own.o_proj], [mlp.fc1], [mlp.fc2])
        )
        device = mlp.fc1.weight.device
        self.joined, self.beside = "one pass" in techniques, "beside" in techniques
        first_begins = max(around, second) if self.beside else around
        self.memory = torch.empty(max(first_begins + first, second), dtype=dtype, device=device)
        # Where each stage is unpacked to; without ``beside``, the first two are one.
        self.places = [self.memory, self.memory[first_begins:], self.memory] if self.beside else [self.memory] * 2
        self.operations = operations(device) if self.joined else reference
        self.stream = torch.cuda.Stream(device) if self.beside and device.type == "cuda" else None
        self.unpacked: dict[int, torch.cuda.Event] = {}  # by stage, of the block in hand

    def stages(self, around: list, first: list, second: list) -> list[tuple[torch.Tensor, list[Sequence[nn.Linear]]]]:
        """Where each stage is unpacked to, and the groups of Linears that are unpacked there together."""
        several = [around, first, second] if self.beside else [[*around, *first], second]
        return list(zip(self.places, several, strict=True))

    def _unpack(self, block, stage: int) -> None:
        weights.unpack(block.packs[stage], self.operations, self.places[stage])

    def _start(self, block, stage: int) -> None:
        """Unpack once all that was asked of the device so far is done, beside what it is asked for next."""
        if self.stream is None:
            self._unpack(block, stage)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self._unpack(block, stage)
            self.unpacked[stage] = self.stream.record_event()

    def _wait(self, stage: int) -> None:
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(self.unpacked[stage])

    def for_attention(self, block, is_first: bool) -> None:
        """Before a block: nothing of the block before is read any more."""
        if self.beside and is_first:
            self._start(block, FIRST)
        self._unpack(block, AROUND_ATTENTION)

    def for_first(self, block) -> None:
        """Behind the attention, whose weights have been read: the second's come in their place while the first is computed."""
        if self.beside:
            self._start(block, SECOND)
            self._wait(FIRST)

    def for_second(self, block, following) -> None:
        """Behind the first product; ``following``: the next block, whose first weight takes this one's place, or None."""
        if not self.beside:
            self._unpack(block, -1)
            return
        if following is not None:
            self._start(following, FIRST)
        self._wait(SECOND)
