"""Plans: which Linears of an NF4 model stay in 16 or 8 bits. A JSON file under ``outputs/<study>/plans``, one for each name.

``plan:NAME`` is then a kind of weights like any other: ``plan:NAME-sdpa``, ``plan:NAME-sdpa-graph`` and so on.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn

from vitnb.errors import UserError, suggest
from vitnb.models import layers, quantization
from vitnb.records.files import write_file
from vitnb.study import Study


@dataclass(frozen=True)
class Plan:
    """What is kept, for which budget, and what was predicted and measured on the validation images that it was chosen on.

    widths: full names of the Linears that are not NF4, with their bits, 16 or 8; the head, always in 16, is not among them.
    budget: bytes that were allowed beyond uniform NF4, as a share of it; extra_bytes: those that are used; uniform_bytes: those of
    uniform NF4 (resident, see ``memory``). kl, kl_low, kl_high: measured mean KL to full precision in nats with its 95% interval.
    """

    name: str
    budget: float
    widths: dict[str, int]
    extra_bytes: int
    uniform_bytes: int
    uniform_kl: float
    predicted_kl: float
    kl: float
    kl_low: float
    kl_high: float
    images: int
    merged_sha256: str  # of the full-precision checkpoint that it was made for

    def of(self, bits: int) -> list[str]:
        """The Linears in 16 or in 8 bits."""
        return [name for name, width in self.widths.items() if width == bits]

    def apply(self, model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
        """Quantize, in place, the 8-bit Linears of an exported model, which holds them in 16; return the counts, as checked.

        bitsandbytes knows one width a checkpoint, so these are made at every load. Raises VariantError if a Linear does not end up
        as planned.
        """
        modules = layers.linears(model)
        for name in (
            name for name in self.of(8) if name in modules and not isinstance(modules[name], quantization.QUANTIZED)
        ):
            model.set_submodule(name, quantization.quantized_copy(modules[name], 8, dtype))
        return quantization.check_counts(model, True, self.widths)


def plan_path(study: Study, name: str) -> Path:
    """Where a plan is kept."""
    return study.outputs / "plans" / f"{name}.json"


def plan_command(study: Study, plan: Plan | str) -> str:
    """The command that makes a plan, or one of this name, for messages."""
    if isinstance(plan, Plan):
        eight = " --widths 8 16" if plan.of(8) else ""
        return f"python -m vitnb plan {study.typed} --name {plan.name} --budget {plan.budget:g}{eight}"
    share = f" --budget {study.plans[plan]:g}" if plan in study.plans else ""
    return f"python -m vitnb plan {study.typed} --name {plan}{share}"


def write_plan(study: Study, plan: Plan) -> Path:
    """Write a plan, whole or not at all."""
    write_file(plan_path(study, plan.name), json.dumps(asdict(plan), indent=1) + "\n")
    return plan_path(study, plan.name)


def read_plan(study: Study, name: str) -> Plan:
    """A study's plan by its name; UserError, with the nearest right name or the command, if there is none or it is broken."""
    file = plan_path(study, name)
    if not file.is_file():
        known = sorted(found.stem for found in file.parent.glob("*.json"))
        hint = f"{suggest(name, known)} Or make" if known else "make"
        raise UserError(f"study '{study.name}' has no plan '{name}': {hint} it with '{plan_command(study, name)}'")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        plan = Plan(**values)
        sound = all(isinstance(bits, int) and bits in (8, 16) for bits in plan.widths.values()) and plan.name == name
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        lacking = ", ".join(field.name for field in fields(Plan)[:3])
        raise UserError(f"{file} is not a plan ({lacking} ...): make it again with '{plan_command(study, name)}'")
    return plan
