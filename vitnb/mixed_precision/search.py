"""Making a plan: measure every Linear in both directions, choose within a budget of bytes, measure the choice, and prove it.

Chosen on validation images only. The proof is on images that chose nothing of it, the test split or, where there is none, half of
the validation images: the plan beside uniform NF4, and beside plans of the same bytes that chance made.
"""

from dataclasses import asdict
from pathlib import Path

from vitnb import devices, statistics, variants
from vitnb.analysis import plan_validation
from vitnb.analysis.plan_validation import BF16, ENDS, INT8, NF4
from vitnb.data.splits import load_split
from vitnb.errors import UserError
from vitnb.mixed_precision import ablation, knapsack, switchable
from vitnb.mixed_precision.knapsack import Costs
from vitnb.mixed_precision.switchable import PLAIN, CachedEvaluator, SwitchableModel
from vitnb.models import checkpoints, loader, plans, quantization
from vitnb.models.export import export_plan
from vitnb.models.layers import transformer_blocks
from vitnb.records.run import begin
from vitnb.study import Study

BUDGETS = (0.02, 0.05, 0.12, 0.25, 0.5, 1.0)  # of the curve: bytes beyond uniform NF4, as a share of it


ALLOWED = {"kept in 16 bits": [16], "kept in 8 or 16 bits": [8, 16]}  # the curves


RANDOM_PLANS = 20


def default_name(share: float, widths: list[int]) -> str:
    """The name of a plan without one: ``plus12`` for 12% more bytes, ``plus12_8`` if 8 bits are allowed, too."""
    return f"plus{100 * share:g}" + "_8" * (8 in widths)


class PlanSearch:
    """One loaded model with the twins of its Linears, the images that choose and those that prove, and what is found so far."""

    def __init__(self, study: Study, folder: Path):
        self.loaded = loader.load_variant(study, variants.parse(variants.BASELINE))
        dtype = devices.compute_dtype(self.loaded.device)
        valid, test, self.proven_on = load_split(study, "valid"), load_split(study, "test"), plan_validation.TEST
        if test.name != "test":  # there is none, and the images that choose prove nothing
            (valid, test), self.proven_on = valid.halves(), plan_validation.HALF
        self.valid, self.test = (switchable.reference_answers(self.loaded, split) for split in (valid, test))
        self.blocks = transformer_blocks(self.loaded.model)
        self.singles = ablation.single_linears(self.loaded.model)
        self.board = SwitchableModel(self.loaded.model, [4, 8], dtype)
        self.merged_sha256 = checkpoints.fingerprint(self.loaded.folder)
        self.done = {
            name: ablation.resume_cache(self.loaded, images, dtype, folder)
            for name, images in (("valid", self.valid), ("test", self.test))
        }
        self.extra, plain = {}, self.board.held_bytes(PLAIN)
        four = self.board.held_bytes(4)
        self.extra = {
            bits: {name: size - four[name] for name, size in self.board.held_bytes(bits).items()} for bits in (8, PLAIN)
        }
        self.uniform_bytes = quantization.resident_bytes(self.board.restore()) + sum(four.values()) - sum(plain.values())

    def ask(self, images: str, widths: dict[str, int], rest: int = 4) -> dict:
        """The scores of ``widths`` on ``valid`` or ``test``, all other Linears in ``rest`` bits; see ``Walk.ask``."""
        walk = CachedEvaluator(self.board, self.loaded, getattr(self, images), rest, replay=False)
        return self.done[images].get(lambda: walk.ask(widths), widths=widths, rest=rest)

    def singly(self, bits: int, rest: int) -> dict[str, dict]:
        """The scores of every Linear, by its full name, in ``bits`` with all others in ``rest``, on the validation images."""
        walk, found = CachedEvaluator(self.board, self.loaded, self.valid, rest), {}
        for part, (name,) in self.singles.items():
            found[name] = self.done["valid"].get(
                lambda name=name: walk.ask({name: bits}), widths={name: bits}, rest=rest
            )
            print(f"{part:16s} in {bits} bits, all others in {rest}: KL {found[name]['kl']:.6f}", flush=True)
        return found


def _costs(bench: PlanSearch, alone: dict[str, dict], kept_alone: dict[str, dict], measured: dict[str, dict]) -> list[Costs]:
    """What the choice is made from, by the scores of each Linear in both directions: own terms, and shares; see ``budget``."""
    plain, nf4, int8 = (measured[name]["kl"] for name in (BF16, NF4, INT8))
    left = min(1.0, max(0.0, int8 - plain) / max(nf4 - plain, 1e-12))
    own = {name: alone[name]["kl"] - plain for name in alone}
    shares = {name: (own[name] + nf4 - kept_alone[name]["kl"]) / 2 for name in alone}
    return [Costs(kl, {PLAIN: 0.0, 8: left}, bench.extra, plain, bench.uniform_bytes) for kl in (own, shares)]


def _choose(bench: PlanSearch, several: list[Costs], allowed: list[int], share: float) -> tuple[dict[str, int], Costs]:
    """The best widths within a budget by each of several costs, of which that with the least KL as measured; and its costs."""
    limit = round(share * bench.uniform_bytes)
    choices = [(knapsack.solve(costs, allowed, limit), costs) for costs in several]
    return min(choices, key=lambda choice: bench.ask("valid", choice[0])["kl"])


def _row(name: str, curve: str, share: float | None, widths: dict[str, int], costs: Costs, scores: dict) -> dict:
    """One point of the trade-off: what was asked, what it costs, what was predicted and what was measured."""
    return {
        "name": name, "curve": curve, "budget": share, "extra_bytes": costs.bytes(widths), "predicted_kl": costs.predicted(widths),
        "widths": widths,
    } | {key: scores[key] for key in ("linears_quantized", "linears_kept", "top1", "kl", "kl_by_image")}  # fmt: skip


def _trade_off(bench: PlanSearch, several: list[Costs], measured: dict[str, dict], share: float) -> list[dict]:
    """The plain choices, and what each budget buys on each curve; a budget that buys nothing new is left out."""
    *_, shares = several  # which tell what the plain choices cost
    every = list(shares.kl)
    ends = {name: PLAIN for name in every if name.startswith((f"{bench.blocks[0]}.", f"{bench.blocks[-1]}."))}
    plain = {NF4: {}, INT8: dict.fromkeys(every, 8), BF16: dict.fromkeys(every, PLAIN), ENDS: ends}
    measured[ENDS] = bench.ask("valid", ends)
    rows = [_row(name, "", None, widths, shares, measured[name]) for name, widths in plain.items()]
    for curve, allowed in ALLOWED.items():
        seen = [{}]
        for one in sorted({*BUDGETS, share}):
            widths, costs = _choose(bench, several, allowed, one)
            if widths in seen:
                continue
            seen.append(widths)
            row = _row(f"+{one:.0%}", curve, one, widths, costs, bench.ask("valid", widths))
            print(
                f"{curve}, +{one:.0%} bytes: {len(widths)} Linears, KL {row['kl']:.5f} (predicted {row['predicted_kl']:.5f})"
            )
            rows.append(row)
    return rows


def _proof(bench: PlanSearch, costs: Costs, widths: dict[str, int], allowed: list[int], seed: int) -> list[dict]:
    """On the images that prove: uniform NF4, 16 bits everywhere, the plan, and plans of the same bytes that chance made."""
    chance = knapsack.random_plans(costs, allowed, widths, RANDOM_PLANS, seed)
    asked = {NF4: {}, BF16: dict.fromkeys(costs.kl, PLAIN), "plan": widths}
    asked |= {f"random {i}": one for i, one in enumerate(chance)}
    rows = []
    for name, one in asked.items():
        rows.append(_row(name, "", None, one, costs, bench.ask("test", one)))
        print(f"{bench.proven_on}, {name}: KL {rows[-1]['kl']:.5f}", flush=True)
    return rows


def make_plan(study: Study, name: str | None = None, share: float = 0.12, widths: list[int] | None = None) -> Path:
    """Make a plan of a study's fine-tuned model: ``plans/NAME.json``, ``checkpoints/plan-NAME``, ``records/plan-NAME.json``.

    Args:
        name: letters, digits, dots and underscores; None: see ``called``.
        share: bytes that it may hold beyond uniform NF4, as a share of it.
        widths: what a Linear may be kept in: [16], the default, or [8, 16].

    Returns the path of the plan. Raises UserError for a bad name or budget, and as ``models.load`` does. A killed run goes on
    from what it has measured.
    """
    widths = sorted(widths or [16])
    name = name or default_name(share, widths)
    if not variants.PLAN_NAME.fullmatch(name):
        raise UserError(f"a plan's name may hold letters, digits, dots and underscores, got '{name}'")
    if not 0 < share <= 10:
        raise UserError(f"budget is a share of the bytes of uniform NF4, such as 0.12 for 12% more, got {share:g}")
    if not set(widths) <= {8, 16}:
        raise UserError(f"widths may be 8 and 16, got {widths}")
    started = begin("plan", study.typed, name=name, budget=share, widths=widths)
    bench = PlanSearch(study, started.unfinished)
    every = list(bench.board.plain)
    least = min(size for bits in widths for size in bench.extra[bits].values()) / bench.uniform_bytes
    if share < least:
        raise UserError(f"a budget of {share:g} keeps no Linear: the smallest takes {least:.3f}; raise --budget")
    if share * bench.uniform_bytes >= sum(bench.extra[PLAIN].values()):
        raise UserError(f"a budget of {share:g} holds every Linear in 16 bits: take bf16-sdpa, or lower --budget")
    measured = {
        NF4: bench.ask("valid", {}), INT8: bench.ask("valid", dict.fromkeys(every, 8)),
        BF16: bench.ask("valid", dict.fromkeys(every, PLAIN)),
    }  # fmt: skip
    alone, kept_alone = bench.singly(4, rest=PLAIN), bench.singly(PLAIN, rest=4)
    several = _costs(bench, alone, kept_alone, measured)
    chosen, costs = _choose(bench, several, widths, share)
    if not chosen:
        raise UserError(f"a budget of {share:g} buys nothing: no Linear that fits costs any KL; raise --budget")
    if len(chosen) == len(every):
        raise UserError(
            f"a budget of {share:g} leaves no Linear in 4 bits: take int8-sdpa or bf16-sdpa, or lower --budget"
        )
    scores = bench.ask("valid", chosen)
    curve, proven = _trade_off(bench, several, measured, share), _proof(bench, costs, chosen, widths, started.seed)
    kl, low, high = statistics.bootstrap_mean(scores["kl_by_image"])
    plan = plans.Plan(
        name, share, chosen, costs.bytes(chosen), bench.uniform_bytes, measured[NF4]["kl"], costs.predicted(chosen), kl, low, high,
        len(bench.valid.labels), bench.merged_sha256,
    )  # fmt: skip
    kept = quantization.modules_to_skip(bench.board.restore(), chosen)
    export = export_plan(study, name, kept)
    path = plans.write_plan(study, plan)
    started.save(
        plan=asdict(plan), left=costs.left, curve=curve, proof=proven, disk_bytes=checkpoints.disk_bytes(export),
        alone={linear: scores["kl_by_image"] for linear, scores in alone.items()},
        kept_alone={linear: scores["kl_by_image"] for linear, scores in kept_alone.items()},
        checkpoint_sha256=checkpoints.fingerprint(export), proven_on=bench.proven_on,
        images={"valid": len(bench.valid.labels), "proof": len(bench.test.reference)},
        parts={linear: part for part, (linear,) in bench.singles.items()},
    )  # fmt: skip
    return path
