"""A budget of bytes: what to keep in 16 or 8 bits, and what chance would have kept for as many bytes.

The model of errors: KL is a quadratic form in small errors of the logits, so what several Linears cost together is what each costs
by itself and a mixed term of each pair. A Linear quantized alone shows its own term; kept alone among quantized ones, its own
and all its mixed terms. The mean of the two directions gives half of a mixed term to either Linear of the pair, so that these
shares add up to the KL of uniform NF4 (in a quadratic game this is the Shapley value: L. S. Shapley, 1953). It is an approximation, which
the measured curve is there to check; and mixed terms are noisy, and fewer the more is kept. So what own terms alone would choose
is measured, too, and the better of the two is taken.

A Linear in 8 bits is taken to cost the share of its 4-bit KL that uniform int8 costs of uniform NF4's: one measured ratio for all.
"""

from dataclasses import dataclass

import numpy as np

from vitnb.errors import UserError

STEPS = 16_384  # the budget is divided into as many steps; costs are rounded up to them


TOLERANCE = 0.01  # of all bytes: how many fewer than the plan's a random plan may hold


DRAWS = 2_000


@dataclass(frozen=True)
class Costs:
    """What the choice is made from.

    kl: nats that each Linear costs in NF4, by the model above; left: share of these that remains at a width ({16: 0.0, 8: ...});
    extra: {bits: {Linear: bytes beyond NF4}}; plain_kl: KL with nothing quantized; uniform_bytes: of the whole model in NF4.
    """

    kl: dict[str, float]
    left: dict[int, float]
    extra: dict[int, dict[str, int]]
    plain_kl: float
    uniform_bytes: int

    def predicted(self, widths: dict[str, int]) -> float:
        """KL of the model with ``widths``, all other Linears in NF4."""
        return self.plain_kl + sum(kl * self.left.get(widths.get(name, 4), 1.0) for name, kl in self.kl.items())

    def bytes(self, widths: dict[str, int]) -> int:
        """Bytes of ``widths`` beyond uniform NF4."""
        return sum(self.extra[bits][name] for name, bits in widths.items())

    def saved(self, name: str, bits: int) -> float:
        """Nats that keeping one Linear in ``bits`` saves."""
        return self.kl[name] * (1 - self.left[bits])


def solve(costs: Costs, allowed: list[int], limit: int) -> dict[str, int]:
    """The widths that save most, predicted, within ``limit`` extra bytes: {Linear: bits}; those in NF4 are left out.

    A multiple-choice knapsack, solved by dynamic programming over the budget: the optimum, but for costs that are rounded up to
    1/16,384 of the budget. Linears whose quantization costs nothing measurable (0 or less) stay in NF4.
    """
    if limit <= 0:
        return {}
    step = limit / STEPS
    best, picks = np.zeros(STEPS + 1), []
    for name in costs.kl:
        pick, better = np.full(STEPS + 1, 4, dtype=np.int8), best
        for bits in allowed:
            need, gain = int(np.ceil(costs.extra[bits][name] / step)), costs.saved(name, bits)
            if gain > 0 and need <= STEPS:
                kept = np.concatenate([np.full(need, -np.inf), best[: STEPS + 1 - need] + gain])
                better, pick = np.where(kept > better, kept, better), np.where(kept > better, np.int8(bits), pick)
        best = better
        picks.append(pick)
    at, found = STEPS, {}
    for name, pick in reversed(list(zip(costs.kl, picks, strict=True))):
        if (bits := int(pick[at])) != 4:
            found[name] = bits
            at -= int(np.ceil(costs.extra[bits][name] / step))
    return dict(reversed(found.items()))


def random_plans(
    costs: Costs, allowed: list[int], plan: dict[str, int], count: int, seed: int = 0
) -> list[dict[str, int]]:
    """Plans of the same bytes that chance made: Linears in random order, each in a random one of ``allowed``, while they fit.

    None holds more bytes than ``plan``, nor fewer by over 1% of the whole model; all differ from it and from each other. Fewer than
    ``count`` where so many cannot be found. Raises UserError if there is none at all.
    """
    limit, generator = costs.bytes(plan), np.random.default_rng(seed)
    fewest = limit - TOLERANCE * (costs.uniform_bytes + limit)
    names, found = list(costs.kl), []
    for _ in range(DRAWS):
        widths, left = {}, limit
        for name in generator.permutation(names).tolist():
            bits = int(generator.choice(allowed))
            if costs.extra[bits][name] <= left:
                widths[name] = bits
                left -= costs.extra[bits][name]
        if limit - left >= fewest and widths != plan and widths not in found:
            found.append(widths)
        if len(found) == count:
            break
    if not found:
        raise UserError("no other choice holds as many bytes as this plan: take another budget")
    return found
