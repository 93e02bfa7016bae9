"""The choice of Linears to keep in 16 or 8 bits within a budget of bytes: a knapsack.

We approximate KL as a quadratic form in the small errors of the logits. Several
quantized Linears then cost the sum of their own terms, and one mixed term for each
pair. Two measurements of a Linear tell its terms. Quantized alone, the Linear shows its
own term. Kept alone among quantized Linears, the Linear shows its own term and all its
mixed terms. The mean of both measurements gives each Linear half of its mixed terms.
These shares add up to the KL of uniform NF4. In a quadratic game a share is the Shapley
value (L. S. Shapley, A Value for n-Person Games, 1953).

The measured curve of KL against bytes checks this approximation. Mixed terms are noisy,
and a plan that keeps many Linears has few of them. So ``search`` also solves the
knapsack with own terms only, measures both choices and takes the better one.

A Linear in 8 bits costs a fixed share of its 4-bit KL. The share is one measured ratio
for all Linears: the KL of uniform int8 over the KL of uniform NF4.
"""

from dataclasses import dataclass

import numpy as np

from vitnb.errors import UserError

NF4_BITS = 4  # bits of a Linear that the plan does not name
STEPS = 16_384  # the budget has this many steps; costs are rounded up to whole steps
TOLERANCE = (
    0.01  # a random plan may hold fewer bytes than the plan by this share of all
)
DRAWS = 2_000  # attempts to draw random plans


@dataclass(frozen=True)
class Costs:
    """What quantizing a Linear costs in nats, and what keeping a Linear costs in bytes.

    kl: nats that each Linear costs in NF4: {full name: nats}.
    remaining_share: share of these nats that remains at a width: {16: 0.0, 8: ...}.
    extra: bytes beyond NF4: {bits: {full name: bytes}}.
    plain_kl: KL in nats of the model with nothing quantized.
    uniform_bytes: bytes of the whole model in NF4.
    """

    kl: dict[str, float]
    remaining_share: dict[int, float]
    extra: dict[int, dict[str, int]]
    plain_kl: float
    uniform_bytes: int

    def predicted(self, widths: dict[str, int]) -> float:
        """Return the predicted KL in nats of ``widths``, all other Linears in NF4."""
        total = self.plain_kl
        for name, kl in self.kl.items():
            bits = widths.get(name, NF4_BITS)
            total += kl if bits == NF4_BITS else kl * self.remaining_share[bits]
        return total

    def bytes(self, widths: dict[str, int]) -> int:
        """Return the bytes of ``widths`` beyond uniform NF4."""
        return sum(self.extra[bits][name] for name, bits in widths.items())

    def saved(self, name: str, bits: int) -> float:
        """Return the nats that keeping one Linear in ``bits`` saves."""
        return self.kl[name] * (1 - self.remaining_share[bits])


def solve(costs: Costs, allowed: list[int], limit: int) -> dict[str, int]:
    """Return the widths with the largest predicted saving within a budget.

    This is a multiple-choice knapsack, solved by dynamic programming over the budget.
    The solution is the optimum, but for costs that are rounded up to 1/16,384 of the
    budget.

    Args:
        costs: nats and bytes of every Linear.
        allowed: widths that a Linear may be kept in, of 8 and 16.
        limit: bytes allowed beyond uniform NF4.

    Returns:
        {full name: bits}, without Linears in NF4. Linears whose quantization costs no
        KL (0 or less) stay in NF4.
    """
    if limit <= 0:
        return {}
    step = limit / STEPS
    best = np.zeros(STEPS + 1)  # nats saved by the Linears so far, for each budget
    picks = []  # for each Linear its bits, for each budget
    for name in costs.kl:
        better = best
        pick = np.full(STEPS + 1, NF4_BITS, dtype=np.int8)
        for bits in allowed:
            need = _steps(costs.extra[bits][name], step)
            gain = costs.saved(name, bits)
            if gain > 0 and need <= STEPS:
                unaffordable = np.full(need, -np.inf)
                with_it = np.append(unaffordable, best[: STEPS + 1 - need] + gain)
                pick = np.where(with_it > better, np.int8(bits), pick)
                better = np.maximum(with_it, better)
        best = better
        picks.append(pick)
    return _trace_back(costs, picks, step)


def _steps(size: int, step: float) -> int:
    """Return the number of budget steps that some bytes take, rounded up."""
    return int(np.ceil(size / step))


def _trace_back(costs: Costs, picks: list[np.ndarray], step: float) -> dict[str, int]:
    """Follow the picks from the full budget back to the first Linear."""
    remaining = STEPS
    widths = {}
    for name, pick in reversed(list(zip(costs.kl, picks, strict=True))):
        bits = int(pick[remaining])
        if bits != NF4_BITS:
            widths[name] = bits
            remaining -= _steps(costs.extra[bits][name], step)
    return dict(reversed(widths.items()))


def random_plans(
    costs: Costs, allowed: list[int], plan: dict[str, int], count: int, seed: int = 0
) -> list[dict[str, int]]:
    """Draw random plans of the same bytes as a plan.

    Linears come in random order, each in a random allowed width, while they fit. No
    random plan holds more bytes than ``plan``, nor fewer by over 1% of the whole model.
    All differ from ``plan`` and from each other.

    Args:
        costs: bytes of every Linear.
        allowed: widths that a Linear may be kept in.
        plan: the plan to compare with, {full name: bits}.
        count: number of plans to draw.
        seed: seed of the random numbers.

    Returns:
        ``count`` plans, fewer where the attempts give fewer.

    Raises:
        UserError: not one plan was drawn.
    """
    limit = costs.bytes(plan)
    fewest = limit - TOLERANCE * (costs.uniform_bytes + limit)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        widths = _draw(costs, allowed, limit, generator)
        large = costs.bytes(widths) >= fewest
        if large and widths != plan and widths not in drawn:
            drawn.append(widths)
        if len(drawn) == count:
            break
    if not drawn:
        raise UserError(
            "no other choice holds as many bytes as this plan: take another budget"
        )
    return drawn


def _draw(
    costs: Costs, allowed: list[int], limit: int, generator: np.random.Generator
) -> dict[str, int]:
    """Fill ``limit`` bytes with random Linears in random allowed widths."""
    widths = {}
    remaining = limit
    for name in generator.permutation(list(costs.kl)).tolist():
        bits = int(generator.choice(allowed))
        size = costs.extra[bits][name]
        if size <= remaining:
            widths[name] = bits
            remaining -= size
    return widths
