"""Load a variant: from a checkpoint to a model that is ready to run."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitnb import devices, variants
from vitnb.errors import UserError, VariantError, raise_known_errors
from vitnb.models import attention, checkpoints, engines, nf4, quantization
from vitnb.study import Study
from vitnb.variants import Variant

if TYPE_CHECKING:
    from vitnb.models.plans import Plan


@dataclass(kw_only=True)
class LoadedVariant:
    """A variant that is ready to run: its model in evaluation mode, and all beside it.

    Attributes:
        variant: what was loaded.
        folder: the checkpoint that it was loaded from.
        model: the model, quantized and rearranged as the variant says.
        processor: the preprocessing that travels with the checkpoint.
        class_names: the classes, in the order of the logits.
        device: where the model is.
        dtype: the type that it computes in.
        launched: the attention backend, a key of ``attention.ALLOWED``.
        linears_quantized: the number of quantized Linears.
        linears_kept: the number of other Linears.
        parameters: the number of weights, whatever type they are stored in.
        disk_bytes: bytes of the checkpoint's files.
        resident_bytes: bytes of the model in memory; see ``quantization``.
        engine: how a forward is launched.
        checkpoint_sha256: of the checkpoint's files when they were read.
    """

    variant: Variant
    folder: Path
    model: nn.Module
    processor: object
    class_names: list[str]
    device: torch.device
    dtype: torch.dtype
    launched: str
    linears_quantized: int
    linears_kept: int
    parameters: int
    disk_bytes: int
    resident_bytes: int
    engine: engines.Engine
    checkpoint_sha256: str

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the fused engine unpacks NF4 weights into; else 0."""
        return getattr(self.model, "scratch_bytes", 0)

    def as_record(self) -> dict[str, object]:
        """Return the entries of a record."""
        return {
            "parameters": self.parameters,
            "dtype": devices.dtype_name(self.dtype),
            "attention_launched": self.launched,
            "linears_quantized": self.linears_quantized,
            "linears_kept": self.linears_kept,
            "device": self.device.type,
            "disk_bytes": self.disk_bytes,
            "resident_bytes": self.resident_bytes,
            "scratch_bytes": self.scratch_bytes,
            **self.engine.as_record(),
            "checkpoint_sha256": self.checkpoint_sha256,
        }

    def as_dependency(self) -> dict[str, object]:
        """Return what an identity holds of this variant, see ``records.identity``."""
        return {
            "checkpoints": {self.variant.checkpoint: self.checkpoint_sha256},
            "dtype": devices.dtype_name(self.dtype),
        }

    @raise_known_errors()
    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """Move pixels, float32 [batch, 3, height, width], to the device and type."""
        return pixels.to(self.device, self.dtype)

    @contextmanager
    def inference(self):
        """Run a block of forwards without gradients; gives the engine to call.

        The engine and the attention kernel are those of the variant.

        Raises:
            VariantError: the attention kernel does not exist for this model, or a
                library failed in the block.
        """
        with (
            raise_known_errors(),
            torch.inference_mode(),
            attention.force_backend(self.launched),
        ):
            yield self.engine


@raise_known_errors()
def load_variant(
    study: Study,
    variant: Variant,
    checkpoint: Path | None = None,
    on: torch.device | None = None,
    techniques: frozenset[str] | None = None,
) -> LoadedVariant:
    """Load one variant of a study's fine-tuned model.

    Args:
        study: a study that was fine-tuned.
        variant: what to load.
        checkpoint: another folder to load from.
        on: another device than ``devices.select_device`` gives.
        techniques: techniques of the fused engine to use, all by default; see
            ``fused.vit``.

    Raises:
        UserError: the checkpoint is missing, a pickle or broken.
        VariantError: the variant cannot run on this machine, other Linears are
            quantized than should be, or a library failed.
    """
    plan, command = _find_plan(study, variant)
    folder = _find_folder(checkpoint or study.checkpoint(variant.checkpoint), command)
    device = on or devices.select_device()
    backend = attention.resolve_backend(variant.attention, device)
    dtype = _compute_dtype(variant, device)
    if variant.weights == "fp8":
        quantization.check_float8(device)
    # TensorFloat-32 would make the full-precision baseline a 19-bit one.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    checkpoint_sha256 = checkpoints.fingerprint(folder)
    model = _read_model(folder, command, backend, dtype, device)
    if variant.checkpoint != "merged" and not _declares_quantization(model):
        raise VariantError(f"{folder} is not quantized: make it again with '{command}'")
    quantized, kept = _quantize(model, variant, plan, dtype)
    parameters = quantization.num_parameters(model)
    if variant.engine == "fused":
        model = _rearrange(model, backend, dtype, techniques)
    nf4.pack_for_cpu(model)
    return LoadedVariant(
        variant=variant,
        folder=folder,
        model=model,
        processor=checkpoints.load_processor(folder),
        class_names=[model.config.id2label[i] for i in range(model.config.num_labels)],
        device=device,
        dtype=dtype,
        launched=backend,
        linears_quantized=quantized,
        linears_kept=kept,
        parameters=parameters,
        disk_bytes=checkpoints.disk_bytes(folder),
        resident_bytes=quantization.resident_bytes(model),
        engine=engines.make_engine(variant.engine, model, device),
        checkpoint_sha256=checkpoint_sha256,
    )


def load_baseline(study: Study) -> LoadedVariant:
    """Load the full-precision variant, see ``load_variant``."""
    return load_variant(study, variants.parse(variants.BASELINE))


def _find_plan(study: Study, variant: Variant) -> tuple["Plan | None", str]:
    """Return the variant's plan, if any, and the command that makes its checkpoint."""
    if not variant.plan:
        return None, f"python -m vitnb run finetune -p study {study.typed}"
    from vitnb.models import plans  # late: most variants have no plan

    plan = plans.read_plan(study, variant.plan)
    _require_current(study, plan, plans.plan_command(study, plan))
    if variant.engine == "fused":
        graph = f"{variant.weights}-{variant.attention}-graph"
        raise VariantError(
            "the fused engine takes uniform NF4 alone, and no plan: "
            f"take the engine graph, {graph}"
        )
    return plan, plans.plan_command(study, plan)


def _require_current(study: Study, plan: "Plan", command: str) -> None:
    """Raise UserError for a plan that was made for another fine-tuning."""
    merged = study.checkpoint("merged")
    if not merged.is_dir() or checkpoints.fingerprint(merged) == plan.merged_sha256:
        return
    raise UserError(
        f"plan '{plan.name}' was made for another model than {merged}: "
        f"make it again with '{command}'"
    )


def _find_folder(folder: Path, command: str) -> Path:
    """Return a checkpoint's folder; raise UserError if it is missing or a pickle."""
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: make it with '{command}'")
    return checkpoints.require_safetensors(folder)


def _compute_dtype(variant: Variant, device: torch.device) -> torch.dtype:
    """Return the type that a variant computes in.

    ``bf16`` always computes in 16 bits, as it is the control for just that. Quantized
    variants compute in float32 where 16-bit products are only emulated.
    """
    if variant.weights == "fp32":
        return torch.float32
    if variant.weights == "bf16":
        return devices.half_dtype(device)
    return devices.compute_dtype(device)


def _read_model(
    folder: Path,
    command: str,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Load a checkpoint in evaluation mode, with every parameter in ``dtype``."""
    model, info = checkpoints.read_model(
        folder,
        dtype=dtype,
        attn_implementation=attention.implementation(backend),
        device_map={"": device},
        output_loading_info=True,
    )
    # transformers fills missing weights with random numbers, and only warns.
    if misfits := checkpoints.describe_misfits(info):
        raise UserError(f"{folder}: {misfits}: make it again with '{command}'")
    quantization.set_compute_dtype(model, dtype)
    return model.eval()


def _declares_quantization(model: nn.Module) -> bool:
    """Tell whether the model's config says that its weights are quantized."""
    return bool(getattr(model.config, "quantization_config", None))


def _quantize(
    model: nn.Module, variant: Variant, plan: "Plan | None", dtype: torch.dtype
) -> tuple[int, int]:
    """Quantize further than the checkpoint, in place; return the checked counts.

    Returns:
        The numbers of quantized and of other Linears.
    """
    if variant.weights == "fp8":
        from vitnb.models.fused import operations  # late: few models are in float8

        quantization.to_fp8(model, operations(model.device).quantize_rows)
    if variant.weights == "w8a8":
        quantization.disable_outliers(model)
    if plan:
        return plan.apply(model, dtype)
    return quantization.check_counts(model, variant.quantized)


@torch.inference_mode()
def _rearrange(
    model: nn.Module,
    backend: str,
    dtype: torch.dtype,
    techniques: frozenset[str] | None,
) -> nn.Module:
    """Return the fused engine's form of a model, which takes over its weights."""
    from vitnb.models.fused.vit import FusedViT  # late: other engines do without

    return FusedViT(model, backend, dtype, techniques)
