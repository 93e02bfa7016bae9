"""Plans: which Linears of an NF4 model stay in 16 or 8 bits.

A plan is a JSON file under ``outputs/<study>/plans``. Its name makes a kind of weights
like any other: ``plan:NAME-sdpa``, ``plan:NAME-sdpa-graph`` and so on.
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
    """The Linears to keep, and what was measured on the images they were chosen on.

    Attributes:
        name: the plan's name.
        budget: bytes allowed beyond uniform NF4, as a share of uniform NF4.
        widths: {full name: bits}, the Linears that are not NF4, in 16 or 8 bits. The
            head, which is always in 16, is not among them.
        extra_bytes: bytes used beyond uniform NF4.
        uniform_bytes: resident bytes of uniform NF4; see ``measure.memory``.
        uniform_kl: measured mean KL of uniform NF4 to full precision, in nats.
        predicted_kl: predicted mean KL of the plan, in nats.
        kl: measured mean KL of the plan, in nats.
        kl_low: lower end of its 95% interval.
        kl_high: upper end of its 95% interval.
        images: the number of validation images.
        merged_sha256: the full-precision checkpoint that the plan was made for.
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
    merged_sha256: str

    def of(self, bits: int) -> list[str]:
        """Return the full names of the Linears in 16 or in 8 bits."""
        return [name for name, width in self.widths.items() if width == bits]

    def apply(self, model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
        """Quantize the 8-bit Linears of the plan's checkpoint, in place.

        A checkpoint of bitsandbytes has one width. So the plan's checkpoint holds its
        8-bit Linears in 16 bits, and they are quantized at every load.

        Args:
            model: the plan's checkpoint as loaded.
            dtype: the type that the model computes in.

        Returns:
            The numbers of quantized and of other Linears, checked.

        Raises:
            VariantError: a Linear does not have its planned width.
        """
        modules = layers.linears(model)
        for name in self.of(8):
            linear = modules.get(name)
            if linear is None or isinstance(linear, quantization.QUANTIZED):
                continue  # check_counts refuses a name that is wrong
            model.set_submodule(name, quantization.quantized_copy(linear, 8, dtype))
        return quantization.check_counts(model, quantized=True, planned=self.widths)


def plan_path(study: Study, name: str) -> Path:
    """Return the path of a plan's file."""
    return study.outputs / "plans" / f"{name}.json"


def plan_command(study: Study, plan: Plan | str) -> str:
    """Return the command that makes a plan, or one of this name, for messages."""
    command = f"python -m vitnb plan {study.typed} --name"
    if isinstance(plan, Plan):
        eight = " --widths 8 16" if plan.of(8) else ""
        return f"{command} {plan.name} --budget {plan.budget:g}{eight}"
    share = f" --budget {study.plans[plan]:g}" if plan in study.plans else ""
    return f"{command} {plan}{share}"


def write_plan(study: Study, plan: Plan) -> Path:
    """Write a plan, whole or not at all, and return its path."""
    path = plan_path(study, plan.name)
    write_file(path, json.dumps(asdict(plan), indent=1) + "\n")
    return path


def read_plan(study: Study, name: str) -> Plan:
    """Return a study's plan by its name.

    Raises:
        UserError: there is no such plan, or its file is broken. The message holds the
            nearest right name or the command that makes the plan.
    """
    path = plan_path(study, name)
    if not path.is_file():
        known = sorted(other.stem for other in path.parent.glob("*.json"))
        hint = f"{suggest(name, known)} Or make" if known else "make"
        raise UserError(
            f"study '{study.name}' has no plan '{name}': "
            f"{hint} it with '{plan_command(study, name)}'"
        )
    plan = _parse_plan(path.read_text(encoding="utf-8"))
    if plan is None or plan.name != name:
        first_fields = ", ".join(field.name for field in fields(Plan)[:3])
        raise UserError(
            f"{path} is not a plan ({first_fields} ...): "
            f"make it again with '{plan_command(study, name)}'"
        )
    return plan


def _parse_plan(text: str) -> Plan | None:
    """Return the plan that a file's text holds, or None if it holds none."""
    try:
        plan = Plan(**json.loads(text))
        widths = list(plan.widths.values())
    except (ValueError, TypeError, AttributeError):
        return None
    if all(isinstance(bits, int) and bits in (8, 16) for bits in widths):
        return plan
    return None
