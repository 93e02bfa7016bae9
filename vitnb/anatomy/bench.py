"""The work bench of the anatomy lesson: images, a fitted classifier, and its exports.

No fine-tuned checkpoint is needed. The base model stays frozen, and its features of the
training images are computed once. Logistic regression on these features gives a real
classifier of all classes after a few seconds.
"""

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from vitnb import devices, variants
from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import SPLITS, Split, load_split
from vitnb.models import checkpoints, layers, loader, nf4, pretrained, quantization
from vitnb.study import Study, load_study

BATCH_SIZE = 128


@dataclass(eq=False)
class Pictures:
    """One split as pictures and as the model's input, each computed at first use."""

    split: Split
    processor: object

    @cached_property
    def labels(self) -> np.ndarray:
        """The class index of every picture, int [images]."""
        return np.asarray(self.split.labels)

    @cached_property
    def images(self) -> list[Image.Image]:
        """Every picture in RGB."""
        return dataset.parallel_map(read_image, self.split.paths)

    @cached_property
    def pixels(self) -> torch.Tensor:
        """Preprocessed as in training: float32 [images, 3, height, width]."""
        return dataset.to_pixels(self.images, self.processor)


@dataclass(eq=False)
class Bench:
    """Everything that several cases share, each computed at first use and then stored.

    study: the study whose images and base model are used.
    seed: seed of every random number.
    test_images: number of test images to use, spread evenly over the classes.
    seconds: how long one comparison of times may take.
    """

    study: Study
    seed: int = 0
    test_images: int = 510
    seconds: float = 2.0

    @classmethod
    def of(cls, study: str, seed: int | None = None, **options) -> "Bench":
        """Return the bench of a study.

        Args:
            study: a name under ``studies/`` or the path of a YAML file.
            seed: None for the study's own.
            options: ``test_images`` and ``seconds``.
        """
        loaded = load_study(study)
        return cls(loaded, loaded.seed if seed is None else seed, **options)

    @cached_property
    def device(self) -> torch.device:
        """The GPU if PyTorch sees one, else the CPU."""
        return devices.select_device()

    @cached_property
    def processor(self):
        """The preprocessing that the base was trained with."""
        return checkpoints.load_processor(pretrained.find_base(self.study))

    @cached_property
    def train(self) -> Pictures:
        """The training images."""
        return Pictures(load_split(self.study, "train"), self.processor)

    @cached_property
    def valid(self) -> Pictures:
        """The validation images."""
        return Pictures(load_split(self.study, "valid"), self.processor)

    @cached_property
    def test(self) -> Pictures:
        """Test images, ``test_images`` at most."""
        whole = load_split(self.study, "test")
        return Pictures(whole.subsample(self.test_images), self.processor)

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of training."""
        return self.train.split.class_names

    @cached_property
    def _base(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return pretrained.load_base(self.study, self.class_names).eval()

    def _features(self, pictures: Pictures) -> np.ndarray:
        """Compute what the base hands to its head: float64 [images, width]."""
        with layers.collect_features(self._base) as batches:
            self.logits(pictures.pixels, self._base)
        return torch.cat(batches).double().numpy()

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """Features of the frozen base by split: {name: float64 [images, width]}."""
        return {name: self._features(getattr(self, name)) for name in SPLITS}

    @cached_property
    def model(self) -> nn.Module:
        """The base with a head fitted by logistic regression: fp32, evaluation mode."""
        features = self.features["train"]
        mean, scale = features.mean(0), features.std(0) + 1e-6
        fitted = LogisticRegression(C=0.1, max_iter=300)
        fitted.fit((features - mean) / scale, self.train.labels)
        rows, offsets = fitted.coef_, fitted.intercept_
        if len(rows) == 1:
            # scikit-learn stores one row for two classes: the second class's logit.
            rows = np.vstack([np.zeros_like(rows), rows])
            offsets = np.append(0, offsets)
        head = self._base.get_submodule(layers.head_name(self._base))
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(rows / scale))
            head.bias.copy_(torch.from_numpy(offsets - rows @ (mean / scale)))
        return self._base

    @torch.inference_mode()
    def logits(
        self, pixels: torch.Tensor, model: nn.Module | None = None
    ) -> torch.Tensor:
        """Return the logits of the fitted model, or of another model.

        Args:
            pixels: float32 [images, 3, height, width].
            model: None for the fitted model.

        Returns:
            float32 [images, classes] on the CPU.
        """
        model = self.model if model is None else model
        batches = []
        for batch in pixels.split(BATCH_SIZE):
            inputs = batch.to(model.device, model.dtype)
            batches.append(model(pixel_values=inputs).logits.float().cpu())
        return torch.cat(batches)

    def top1(self, pixels: torch.Tensor, model: nn.Module | None = None) -> float:
        """Return the share of correct predictions for pixels of the test images."""
        predicted = self.logits(pixels, model).argmax(-1).numpy()
        return float((predicted == self.test.labels).mean())

    @cached_property
    def exports(self) -> dict[str, Path]:
        """Checkpoints of the fitted model: {``fp32``, ``nf4`` or ``int8``: folder}."""
        root = Path(tempfile.mkdtemp(prefix="anatomy-"))
        weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        folders = {weights: root / weights for weights in ("fp32", "nf4", "int8")}
        # transformers must know the attention's name in the file without this package.
        self.model.set_attn_implementation("sdpa")
        self.model.save_pretrained(folders["fp32"])
        self.model.set_attn_implementation("vitnb-sdpa")
        kept = quantization.modules_to_skip(self.model)
        for weights in ("nf4", "int8"):
            small = _quantized(folders["fp32"], weights, kept, self.device)
            nf4.disable_cpu_packing(small).save_pretrained(folders[weights])
        for folder in folders.values():
            self.processor.save_pretrained(folder)
        return folders

    def quantized(self, kept: list[str]) -> nn.Module:
        """Load the fitted model as NF4, with some Linears kept in 16 bits.

        Args:
            kept: full names of modules; the list is not checked.
        """
        return _quantized(self.exports["fp32"], "nf4", kept, self.device)

    def loaded(self, variant: str) -> loader.LoadedVariant:
        """Load a variant of the exports by its name, ready to run."""
        chosen = variants.parse(variant)
        weights = chosen.weights if chosen.quantized else "fp32"
        return loader.load_variant(self.study, chosen, self.exports[weights])


def _quantized(
    folder: Path, weights: str, kept: list[str], on: torch.device
) -> nn.Module:
    """Load a full-precision checkpoint as ``nf4`` or ``int8``, to be counted or saved.

    Weights that are not quantized are in 16 bits, as in every export.
    """
    half = devices.half_dtype(on)
    return checkpoints.read_model(
        folder,
        dtype=half,
        quantization_config=quantization.bnb_config(weights, kept, half),
        device_map={"": on},
    ).eval()
