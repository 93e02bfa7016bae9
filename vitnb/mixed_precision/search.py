"""The search for a plan: which Linears to keep in 16 or 8 bits for a budget of bytes.

The search measures every Linear in both directions, chooses within the budget, and
measures the choice, on validation images only. The plan is then validated on images
that chose nothing: the test split or, without one, half of the validation images.
There the plan stands beside uniform NF4 and beside random plans of the same bytes.
"""

from dataclasses import asdict
from pathlib import Path

from vitnb import devices, statistics, variants
from vitnb.analysis import plan_validation
from vitnb.analysis.plan_validation import BF16, ENDS, INT8, NF4
from vitnb.data.splits import Split, load_split
from vitnb.errors import UserError
from vitnb.mixed_precision import ablation, knapsack
from vitnb.mixed_precision.knapsack import Costs
from vitnb.mixed_precision.switchable import (
    UNQUANTIZED,
    CachedEvaluator,
    SwitchableModel,
    reference_answers,
)
from vitnb.models import checkpoints, layers, loader, plans, quantization
from vitnb.models.export import export_plan
from vitnb.records.run import begin
from vitnb.study import Study

# Budgets of the curve: bytes beyond uniform NF4, as a share of its bytes.
BUDGETS = (0.02, 0.05, 0.12, 0.25, 0.5, 1.0)

# The curves, with the widths that a Linear may be kept in.
ALLOWED = {"kept in 16 bits": [16], "kept in 8 or 16 bits": [8, 16]}

RANDOM_PLANS = 20

# Keys of the scores that a row of the record holds.
SCORES = ("linears_quantized", "linears_kept", "top1", "kl", "kl_by_image")


def make_plan(
    study: Study,
    name: str | None = None,
    share: float = 0.12,
    widths: list[int] | None = None,
) -> Path:
    """Search a plan for a study's fine-tuned model, export its checkpoint, write both.

    The files are ``plans/NAME.json``, ``checkpoints/plan-NAME`` and
    ``records/plan-NAME.json``. A run that was killed continues from what it has
    measured.

    Args:
        study: a study with a fine-tuned model.
        name: letters, digits, dots and underscores; None: see ``default_name``.
        share: the budget: bytes beyond uniform NF4, as a share of its bytes.
        widths: widths that a Linear may be kept in: [16], the default, or [8, 16].

    Returns:
        The path of the plan.

    Raises:
        UserError: a bad name or budget, and the errors of ``loader.load_variant``.
    """
    widths = sorted(widths or [16])
    name = name or default_name(share, widths)
    _check_request(name, share, widths)
    run = begin("plan", study.typed, name=name, budget=share, widths=widths)
    search = PlanSearch(study, run.unfinished)
    run.depend_on(search.loaded, *search.splits)
    search.check_budget(share, widths)

    uniform = search.measure_uniform()
    alone = search.measure_linears(4, rest=UNQUANTIZED)
    kept_alone = search.measure_linears(UNQUANTIZED, rest=4)
    estimates = estimate_costs(search, alone, kept_alone, uniform)
    chosen, costs = choose_widths(search, estimates, widths, share)
    _check_choice(chosen, search, share)

    curve = measure_curve(search, estimates, share)
    validation = validate_choice(search, costs, chosen, widths, run.seed)
    plan = _describe_plan(name, share, chosen, search, costs, uniform)
    kept = quantization.modules_to_skip(search.switchable.restore(), chosen)
    export = export_plan(study, name, kept)
    path = plans.write_plan(study, plan)
    run.save(
        plan=asdict(plan),
        left=costs.remaining_share,
        curve=curve,
        proof=validation,
        disk_bytes=checkpoints.disk_bytes(export),
        alone=_kl_by_image(alone),
        kept_alone=_kl_by_image(kept_alone),
        checkpoint_sha256=checkpoints.fingerprint(export),
        proven_on=search.validated_on,
        images={
            "valid": len(search.images["valid"].reference),
            "proof": len(search.images["test"].reference),
        },
        parts={linear: part for part, (linear,) in search.parts.items()},
    )
    return path


def default_name(share: float, widths: list[int]) -> str:
    """Name a plan by its budget.

    ``plus12`` allows 12% more bytes, ``plus12_8`` also allows 8 bits.
    """
    name = f"plus{100 * share:g}"
    return f"{name}_8" if 8 in widths else name


def _check_request(name: str, share: float, widths: list[int]) -> None:
    """Raise UserError for a bad name, budget or width, before anything is loaded."""
    if not variants.PLAN_NAME.fullmatch(name):
        raise UserError(
            "a plan's name may hold letters, digits, dots and underscores, "
            f"got '{name}'"
        )
    if not 0 < share <= 10:
        raise UserError(
            "budget is a share of the bytes of uniform NF4, "
            f"such as 0.12 for 12% more, got {share:g}"
        )
    if not set(widths) <= {8, 16}:
        raise UserError(f"widths may be 8 and 16, got {widths}")


class PlanSearch:
    """One loaded model with quantized copies of its Linears, and images to measure on.

    images: ``valid``, images to choose by, and ``test``, images to validate on.
    validated_on: the images of ``test`` in words.
    splits: both splits.
    parts: every Linear but the head, {name such as "layer 0 q": [full name]}.
    extra: bytes of each Linear beyond NF4, {8 or 16: {full name: bytes}}.
    uniform_bytes: bytes of the whole model in NF4.
    merged_sha256: fingerprint of the full-precision checkpoint.

    Args:
        study: a study with a fine-tuned model.
        folder: where finished measurements wait until the record is written.
    """

    def __init__(self, study: Study, folder: Path):
        self.loaded = loader.load_baseline(study)
        self.merged_sha256 = self.loaded.checkpoint_sha256
        valid, test, self.validated_on = _load_images(study)
        self.splits = (valid, test)
        self.images = {
            "valid": reference_answers(self.loaded, valid),
            "test": reference_answers(self.loaded, test),
        }
        dtype = devices.compute_dtype(self.loaded.device)
        self.caches = {
            name: ablation.resume_cache(self.loaded, images, dtype, folder)
            for name, images in self.images.items()
        }
        self.parts = ablation.single_linears(self.loaded.model)
        self.blocks = layers.transformer_blocks(self.loaded.model)
        self.switchable = SwitchableModel(self.loaded.model, [4, 8], dtype)
        self.linears = list(self.switchable.linears)
        sizes = {
            bits: self.switchable.linear_bytes(bits) for bits in (4, 8, UNQUANTIZED)
        }
        self.extra = {
            bits: {name: sizes[bits][name] - sizes[4][name] for name in self.linears}
            for bits in (8, UNQUANTIZED)
        }
        whole = quantization.resident_bytes(self.switchable.restore())
        self.uniform_bytes = whole - sum(self.extra[UNQUANTIZED].values())

    def check_budget(self, share: float, widths: list[int]) -> None:
        """Raise UserError for a budget that keeps no Linear, or every one in 16 bits.

        Args:
            share: the budget, as a share of the bytes of uniform NF4.
            widths: widths that a Linear may be kept in.
        """
        smallest = min(min(self.extra[bits].values()) for bits in widths)
        least = smallest / self.uniform_bytes
        if share < least:
            raise UserError(
                f"a budget of {share:g} keeps no Linear: "
                f"the smallest takes {least:.3f}; raise --budget"
            )
        if share * self.uniform_bytes >= sum(self.extra[UNQUANTIZED].values()):
            raise UserError(
                f"a budget of {share:g} holds every Linear in 16 bits: "
                "take bf16-sdpa, or lower --budget"
            )

    def evaluate(self, images: str, widths: dict[str, int], rest: int = 4) -> dict:
        """Score one choice of widths, see ``CachedEvaluator.evaluate``.

        Args:
            images: ``valid`` or ``test``.
            widths: {full name of a Linear: bits}.
            rest: bits of all other Linears.
        """
        evaluator = CachedEvaluator(
            self.switchable, self.loaded, self.images[images], rest, replay=False
        )
        return self.caches[images].get(
            lambda: evaluator.evaluate(widths), widths=widths, rest=rest
        )

    def measure_uniform(self) -> dict[str, dict]:
        """Score the model with all Linears in 4, 8 and 16 bits: {name: scores}."""
        return {
            NF4: self.evaluate("valid", {}),
            INT8: self.evaluate("valid", dict.fromkeys(self.linears, 8)),
            BF16: self.evaluate("valid", dict.fromkeys(self.linears, UNQUANTIZED)),
        }

    def measure_linears(self, bits: int, rest: int) -> dict[str, dict]:
        """Score every Linear in turn in ``bits``, all others in ``rest`` bits.

        Returns {full name: scores}, on the validation images.
        """
        evaluator = CachedEvaluator(
            self.switchable, self.loaded, self.images["valid"], rest
        )
        measured = {}
        for part, (name,) in self.parts.items():
            widths = {name: bits}
            measured[name] = self.caches["valid"].get(
                lambda widths=widths: evaluator.evaluate(widths),
                widths=widths,
                rest=rest,
            )
            print(
                f"{part:16s} in {bits} bits, all others in {rest}: "
                f"KL {measured[name]['kl']:.6f}",
                flush=True,
            )
        return measured


def _load_images(study: Study) -> tuple[Split, Split, str]:
    """Return the images to choose by, the images to validate on, and these in words."""
    valid, test = load_split(study, "valid"), load_split(study, "test")
    if test.name != "test":
        # Without a test split, the images that choose would validate as well.
        return *valid.split_in_half(), plan_validation.HALF
    return valid, test, plan_validation.TEST


def estimate_costs(
    search: PlanSearch,
    alone: dict[str, dict],
    kept_alone: dict[str, dict],
    uniform: dict[str, dict],
) -> list[Costs]:
    """Estimate what each Linear costs in NF4, in two ways; see ``knapsack``.

    Args:
        search: bytes of every Linear.
        alone: scores with one Linear quantized, {full name: scores}.
        kept_alone: scores with all Linears but one quantized, {full name: scores}.
        uniform: scores of the model in 4, 8 and 16 bits.

    Returns:
        Costs by own terms only, and costs by shares, with half of the mixed terms.
    """
    plain, nf4, int8 = (uniform[name]["kl"] for name in (BF16, NF4, INT8))
    eight_bits = min(1.0, max(0.0, int8 - plain) / max(nf4 - plain, 1e-12))
    own = {name: alone[name]["kl"] - plain for name in alone}
    shares = {name: (own[name] + nf4 - kept_alone[name]["kl"]) / 2 for name in alone}
    remaining_share = {UNQUANTIZED: 0.0, 8: eight_bits}
    return [
        Costs(kl, remaining_share, search.extra, plain, search.uniform_bytes)
        for kl in (own, shares)
    ]


def choose_widths(
    search: PlanSearch, estimates: list[Costs], allowed: list[int], share: float
) -> tuple[dict[str, int], Costs]:
    """Solve the knapsack by each estimate and return the choice with the least KL.

    The KL is measured, on the validation images. The estimate of the choice comes with
    it.
    """
    limit = round(share * search.uniform_bytes)
    choices = [(knapsack.solve(costs, allowed, limit), costs) for costs in estimates]
    return min(choices, key=lambda choice: search.evaluate("valid", choice[0])["kl"])


def _check_choice(chosen: dict[str, int], search: PlanSearch, share: float) -> None:
    """Raise UserError for a choice of no Linear, or of every one."""
    if not chosen:
        raise UserError(
            f"a budget of {share:g} buys nothing: "
            "no Linear that fits costs any KL; raise --budget"
        )
    if len(chosen) == len(search.linears):
        raise UserError(
            f"a budget of {share:g} leaves no Linear in 4 bits: "
            "take int8-sdpa or bf16-sdpa, or lower --budget"
        )


def measure_curve(
    search: PlanSearch, estimates: list[Costs], share: float
) -> list[dict]:
    """Measure the trade-off of bytes and KL, on the validation images.

    Four choices that no budget made come first. Then each curve has a row for each
    budget, ``share`` among them. A budget that buys nothing new has no row.
    """
    linears = search.linears
    ends = (f"{search.blocks[0]}.", f"{search.blocks[-1]}.")
    fixed = {
        NF4: {},
        INT8: dict.fromkeys(linears, 8),
        BF16: dict.fromkeys(linears, UNQUANTIZED),
        ENDS: {name: UNQUANTIZED for name in linears if name.startswith(ends)},
    }
    _, shares = estimates
    rows = []
    for name, widths in fixed.items():
        scores = search.evaluate("valid", widths)
        rows.append(_row(name, widths, shares, scores))
    for curve, allowed in ALLOWED.items():
        seen = [{}]
        for budget in sorted({*BUDGETS, share}):
            widths, costs = choose_widths(search, estimates, allowed, budget)
            if widths in seen:
                continue
            seen.append(widths)
            scores = search.evaluate("valid", widths)
            row = _row(f"+{budget:.0%}", widths, costs, scores, curve, budget)
            print(
                f"{curve}, +{budget:.0%} bytes: {len(widths)} Linears, "
                f"KL {row['kl']:.5f} (predicted {row['predicted_kl']:.5f})"
            )
            rows.append(row)
    return rows


def validate_choice(
    search: PlanSearch,
    costs: Costs,
    chosen: dict[str, int],
    allowed: list[int],
    seed: int,
) -> list[dict]:
    """Measure a choice on the images that chose nothing of it.

    Uniform NF4, 16 bits everywhere, the plan, and random plans of the same bytes have a
    row each.
    """
    compared = {
        NF4: {},
        BF16: dict.fromkeys(search.linears, UNQUANTIZED),
        "plan": chosen,
    }
    drawn = knapsack.random_plans(costs, allowed, chosen, RANDOM_PLANS, seed)
    for i, widths in enumerate(drawn):
        compared[f"random {i}"] = widths
    rows = []
    for name, widths in compared.items():
        row = _row(name, widths, costs, search.evaluate("test", widths))
        print(f"{search.validated_on}, {name}: KL {row['kl']:.5f}", flush=True)
        rows.append(row)
    return rows


def _row(
    name: str,
    widths: dict[str, int],
    costs: Costs,
    scores: dict,
    curve: str = "",
    budget: float | None = None,
) -> dict:
    """Return one point of the trade-off: bytes, KL as predicted, and the scores."""
    row = {
        "name": name,
        "curve": curve,
        "budget": budget,
        "extra_bytes": costs.bytes(widths),
        "predicted_kl": costs.predicted(widths),
        "widths": widths,
    }
    return row | {key: scores[key] for key in SCORES}


def _describe_plan(
    name: str,
    share: float,
    chosen: dict[str, int],
    search: PlanSearch,
    costs: Costs,
    uniform: dict[str, dict],
) -> plans.Plan:
    """Return the plan with its KL, predicted and measured on the validation images."""
    scores = search.evaluate("valid", chosen)
    kl, low, high = statistics.bootstrap_mean(scores["kl_by_image"])
    return plans.Plan(
        name=name,
        budget=share,
        widths=chosen,
        extra_bytes=costs.bytes(chosen),
        uniform_bytes=search.uniform_bytes,
        uniform_kl=uniform[NF4]["kl"],
        predicted_kl=costs.predicted(chosen),
        kl=kl,
        kl_low=low,
        kl_high=high,
        images=len(search.images["valid"].reference),
        merged_sha256=search.merged_sha256,
    )


def _kl_by_image(measured: dict[str, dict]) -> dict[str, list[float]]:
    """Return the KL of each image alone: {full name: [images]}."""
    return {linear: scores["kl_by_image"] for linear, scores in measured.items()}
