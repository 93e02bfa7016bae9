"""Models: from a checkpoint to a variant that is ready to run."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitnb import devices
from vitnb.errors import UserError, VariantError
from vitnb.models import attention, checkpoints, engines, plans, quantization
from vitnb.study import Study
from vitnb.variants import Variant


@dataclass
class LoadedVariant:
    """A variant, ready to run: the model in evaluation mode, its preprocessing, its classes and what was counted."""

    variant: Variant
    folder: Path
    model: nn.Module
    processor: object
    class_names: list[str]
    device: torch.device
    dtype: torch.dtype
    launched: str  # how its attention is launched, a key of attention.ALLOWED
    linears_quantized: int
    linears_kept: int
    parameters: int  # the number of weights, whatever they are stored in
    disk_bytes: int
    resident_bytes: int
    engine: engines.Engine

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the memory that NF4 weights are unpacked into by the fused engine; 0 for the other engines."""
        return getattr(self.model, "scratch_bytes", 0)

    def as_record(self) -> dict[str, object]:
        """What a record keeps of a loaded variant."""
        return {
            "parameters": self.parameters, "dtype": str(self.dtype).removeprefix("torch."), "attention_launched": self.launched,
            "linears_quantized": self.linears_quantized, "linears_kept": self.linears_kept,
            "device": self.device.type, "disk_bytes": self.disk_bytes, "resident_bytes": self.resident_bytes,
            "scratch_bytes": self.scratch_bytes, **self.engine.as_record(),
            "checkpoint_sha256": checkpoints.fingerprint(self.folder),
        }  # fmt: skip

    def prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 [batch, 3, height, width], where and in the type that the model wants them."""
        return pixels.to(self.device, self.dtype)

    @contextmanager
    def inference(self):
        """A block of forwards without gradients, launched and with the attention kernel as the variant asks.

        Raises VariantError where that kernel does not exist for this model.
        """
        with torch.inference_mode(), attention.force_backend(self.launched):
            yield self.engine


def load_variant(
    study: Study,
    variant: Variant,
    checkpoint: Path | None = None,
    on: torch.device | None = None,
    techniques: frozenset[str] | None = None,
) -> LoadedVariant:
    """Load one variant of a study's fine-tuned model (or of ``checkpoint``), on ``on`` or what ``device`` gives.

    ``techniques``: those of the fused engine that are used, all by default; see ``fused.vit``.

    Raises:
        UserError: the checkpoint is missing, a pickle or broken.
        VariantError: the variant cannot run on this machine, or not all that should be quantized was.
    """
    plan = plans.read_plan(study, variant.plan) if variant.plan else None
    if plan and variant.engine == "fused":
        raise VariantError(
            f"the fused engine takes uniform NF4 alone, and no plan: take the engine graph, {variant.weights}-{variant.attention}-graph"
        )
    folder = checkpoint or study.checkpoint(variant.checkpoint)
    made = plans.plan_command(study, plan) if plan else f"python -m vitnb run finetune -p study {study.typed}"
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: make it with '{made}'")
    on = on or devices.select_device()
    launched = attention.resolve_backend(variant.attention, on)
    dtype = _dtype(variant, on)
    if variant.weights == "fp8":
        quantization.check_float8(on)
    # TensorFloat-32 would make the full-precision baseline a 19-bit one.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # transformers fills what a checkpoint lacks with random numbers, and only warns.
    model, found = checkpoints.read_model(
        checkpoints.require_safetensors(folder),
        dtype=dtype,
        attn_implementation=attention.implementation(launched),
        device_map={"": on},
        output_loading_info=True,
    )
    if wrong := checkpoints.describe_misfits(found):
        raise UserError(f"{folder}: {wrong}: make it again with '{made}'")
    for parameter in model.parameters():
        # A loader may leave weights in the type of the file.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.eval()
    for module in model.modules():
        if isinstance(module, quantization.bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    quantization.disable_cpu_packing(model, only_uneven=True)
    if variant.checkpoint != "merged" and not getattr(model.config, "quantization_config", None):
        raise VariantError(f"{folder} is not quantized: make it again with '{made}'")
    if variant.weights == "fp8":
        quantization.to_fp8(model)
    if variant.weights == "w8a8":
        quantization.disable_outliers(model)
    quantized, kept = plan.apply(model, dtype) if plan else quantization.check_counts(model, variant.quantized)
    parameters = quantization.num_parameters(model)
    if variant.engine == "fused":
        from vitnb.models.fused.vit import FusedViT  # late: other engines do without

        with torch.inference_mode():
            model = FusedViT(model, launched, dtype, techniques)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return LoadedVariant(
        variant,
        folder,
        model,
        checkpoints.load_processor(folder),
        names,
        on,
        dtype,
        launched,
        quantized,
        kept,
        parameters,
        checkpoints.disk_bytes(folder),
        quantization.resident_bytes(model),
        engines.make_engine(variant.engine, model, on),
    )


def _dtype(variant: Variant, device: torch.device) -> torch.dtype:
    """Return the type that a variant computes in.

    ``bf16`` always computes in 16 bits, as it is the control for just that. Quantized
    variants compute in float32 where 16-bit products are only emulated.
    """
    if variant.weights == "fp32":
        return torch.float32
    if variant.weights == "bf16":
        return devices.half_dtype(device)
    return devices.compute_dtype(device)
