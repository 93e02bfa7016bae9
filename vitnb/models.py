"""Models: from a checkpoint to a variant that is ready to run."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitnb import attention, checkpoints, engines, fp8, plans, quantize, studies
from vitnb.errors import UserError, VariantError
from vitnb.fused.vit import FusedViT
from vitnb.variants import Variant


def device(asked: str | None = None) -> torch.device:
    """The device that was asked for, ``cpu`` or ``cuda``; without a wish the GPU if PyTorch sees one, else the CPU.

    Raises UserError for another name, or for a GPU that is not there.
    """
    if asked not in (None, "cpu", "cuda"):
        raise UserError(f"device must be cpu or cuda, got '{asked}'")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, and PyTorch sees no NVIDIA GPU: leave it out, or ask for cpu")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def half(on: torch.device) -> torch.dtype:
    """The 16-bit type to compute in: bfloat16, and float16 on GPUs below SM80, which have no bfloat16 units."""
    return torch.float16 if on.type == "cuda" and torch.cuda.get_device_capability(on) < (8, 0) else torch.bfloat16


@dataclass
class Loaded:
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

    def found(self) -> dict[str, object]:
        """What a record keeps of a loaded variant."""
        return {
            "parameters": self.parameters, "dtype": str(self.dtype).removeprefix("torch."), "attention_launched": self.launched,
            "linears_quantized": self.linears_quantized, "linears_kept": self.linears_kept,
            "device": self.device.type, "disk_bytes": self.disk_bytes, "resident_bytes": self.resident_bytes,
            "scratch_bytes": self.scratch_bytes, **self.engine.found(),
            "checkpoint_sha256": checkpoints.fingerprint(self.folder),
        }  # fmt: skip

    def to_input(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels, float32 [batch, 3, height, width], where and in the type that the model wants them."""
        return pixels.to(self.device, self.dtype)

    @contextmanager
    def running(self):
        """A block of forwards without gradients, launched and with the attention kernel as the variant asks.

        Raises VariantError where that kernel does not exist for this model.
        """
        with torch.inference_mode(), attention.forced(self.launched):
            yield self.engine


def load(
    study: studies.Study,
    variant: Variant,
    checkpoint: Path | None = None,
    on: torch.device | None = None,
    techniques: frozenset[str] | None = None,
) -> Loaded:
    """Load one variant of a study's fine-tuned model (or of ``checkpoint``), on ``on`` or what ``device`` gives.

    ``techniques``: those of the fused engine that are used, all by default; see ``fused.vit``.

    Raises:
        UserError: the checkpoint is missing, a pickle or broken.
        VariantError: the variant cannot run on this machine, or not all that should be quantized was.
    """
    plan = plans.read(study, variant.plan) if variant.plan else None
    if plan and variant.engine == "fused":
        raise VariantError(
            f"the fused engine takes uniform NF4 alone, and no plan: take the engine graph, {variant.weights}-{variant.attention}-graph"
        )
    folder = checkpoint or study.checkpoint(variant.checkpoint)
    made = plans.command(study, plan) if plan else f"python -m vitnb run finetune -p study {study.typed}"
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: make it with '{made}'")
    on = on or device()
    launched = attention.launch(variant.attention, on)
    dtype = torch.float32 if variant.weights == "fp32" else half(on)
    if variant.weights == "fp8":
        fp8.check_device(on)
    # TensorFloat-32 would make the full-precision baseline a 19-bit one.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # transformers fills what a checkpoint lacks with random numbers, and only warns.
    model, found = checkpoints.read(
        checkpoints.safe(folder),
        dtype=dtype,
        attn_implementation=attention.implementation(launched),
        device_map={"": on},
        output_loading_info=True,
    )
    if wrong := checkpoints.misfits(found):
        raise UserError(f"{folder}: {wrong}: make it again with '{made}'")
    model.eval()
    for module in model.modules():
        if isinstance(module, quantize.bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    quantize.forbid_packing(model, only_uneven=True)
    if variant.checkpoint != "merged" and not getattr(model.config, "quantization_config", None):
        raise VariantError(f"{folder} is not quantized: make it again with '{made}'")
    if variant.weights == "fp8":
        quantize.to_fp8(model)
    if variant.weights == "w8a8":
        quantize.all_activations(model)
    quantized, kept = plan.apply(model, dtype) if plan else quantize.check_counts(model, variant.quantized)
    parameters = quantize.parameters(model)
    if variant.engine == "fused":
        with torch.inference_mode():
            model = FusedViT(model, launched, dtype, techniques)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return Loaded(
        variant,
        folder,
        model,
        checkpoints.processor(folder),
        names,
        on,
        dtype,
        launched,
        quantized,
        kept,
        parameters,
        checkpoints.disk_bytes(folder),
        quantize.resident_bytes(model),
        engines.start(variant.engine, model, on),
    )
