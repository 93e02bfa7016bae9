"""What several cases share: a study's images, its base model with a quickly fitted head, and small exports of it.

No fine-tuned checkpoint is needed. The base stays frozen, its features of the training images are computed once, and
logistic regression on them is a real classifier of all classes after a few seconds.
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
from transformers import AutoModelForImageClassification

from vitnb import devices, variants
from vitnb.data import dataset
from vitnb.data.images import read_image
from vitnb.data.splits import SPLITS, Split, load_split
from vitnb.models import checkpoints, layers, loader, pretrained, quantization
from vitnb.study import Study, load_study

BATCH_SIZE = 128


@dataclass(eq=False)
class Pictures:
    """One split (or evenly spread images of it), as files, as pictures, and as the model wants them."""

    split: Split
    processor: object
    count: int

    @cached_property
    def chosen(self) -> list[int]:
        whole = len(self.split)
        return [i * whole // self.count for i in range(self.count)] if self.count < whole else list(range(whole))

    @cached_property
    def labels(self) -> np.ndarray:
        """The class index of every picture, int [images]."""
        return np.asarray([self.split.labels[i] for i in self.chosen])

    @cached_property
    def images(self) -> list[Image.Image]:
        return [read_image(self.split.paths[i]) for i in self.chosen]

    @cached_property
    def pixels(self) -> torch.Tensor:
        """float32 [images, 3, height, width], resized and normalized as the model was trained."""
        return dataset.to_pixels(self.images, self.processor)


@dataclass(eq=False)
class Bench:
    """The work bench of the anatomy lesson. Everything is computed when it is first asked for, and then kept.

    test_images: how many images of the test split are used, spread evenly over its classes.
    seconds: how long one comparison of times may take.
    """

    study: Study
    seed: int = 0
    test_images: int = 510
    seconds: float = 2.0

    @classmethod
    def of(cls, study: str, seed: int | None = None, **options) -> "Bench":
        """The bench of a study by its name or YAML path; without a seed, with the study's own."""
        loaded = load_study(study)
        return cls(loaded, loaded.seed if seed is None else seed, **options)

    @cached_property
    def device(self) -> torch.device:
        return devices.select_device()

    @cached_property
    def processor(self):
        """The preprocessing that the base was trained with."""
        return checkpoints.load_processor(pretrained.find_base(self.study))

    @cached_property
    def train(self) -> Pictures:
        whole = load_split(self.study, "train")
        return Pictures(whole, self.processor, len(whole))

    @cached_property
    def valid(self) -> Pictures:
        whole = load_split(self.study, "valid")
        return Pictures(whole, self.processor, len(whole))

    @cached_property
    def test(self) -> Pictures:
        return Pictures(load_split(self.study, "test"), self.processor, self.test_images)

    @cached_property
    def class_names(self) -> list[str]:
        return self.train.split.class_names

    @cached_property
    def _base(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return pretrained.load_base(self.study, self.class_names).eval()

    def _features(self, pictures: Pictures) -> np.ndarray:
        found = []
        head = self._base.get_submodule(layers.head_name(self._base))
        hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().cpu()))
        self.logits(pictures.pixels, self._base)
        hook.remove()
        return torch.cat(found).double().numpy()

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """What the frozen base hands to its head for ``train``, ``valid`` and ``test``: float64 [images, width] each."""
        return {name: self._features(getattr(self, name)) for name in SPLITS}

    @cached_property
    def model(self) -> nn.Module:
        """The base with a head that was fitted by logistic regression, in fp32 and evaluation mode."""
        features = self.features["train"]
        mean, scale = features.mean(0), features.std(0) + 1e-6
        fitted = LogisticRegression(C=0.1, max_iter=300).fit((features - mean) / scale, self.train.labels)
        # scikit-learn keeps one row for two classes: the second's logit, with the first's at zero.
        two = len(fitted.coef_) == 1
        rows = np.vstack([0 * fitted.coef_, fitted.coef_]) if two else fitted.coef_
        offsets = np.append(0, fitted.intercept_) if two else fitted.intercept_
        head = self._base.get_submodule(layers.head_name(self._base))
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(rows / scale))
            head.bias.copy_(torch.from_numpy(offsets - rows @ (mean / scale)))
        return self._base

    @torch.inference_mode()
    def logits(self, pixels: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        """Logits of the fitted model, or of another one: [images, 3, height, width] -> float32 [images, classes]."""
        model = self.model if model is None else model
        batches = (batch.to(model.device, model.dtype) for batch in pixels.split(BATCH_SIZE))
        return torch.cat([model(pixel_values=batch).logits.float().cpu() for batch in batches])

    def top1(self, pixels: torch.Tensor, model: nn.Module | None = None) -> float:
        """Share of right answers for pixels of the test images, between 0 and 1."""
        return float((self.logits(pixels, model).argmax(-1).numpy() == self.test.labels).mean())

    @cached_property
    def exports(self) -> dict[str, Path]:
        """Checkpoints of the fitted model, with its preprocessing: ``fp32``, ``nf4`` and ``int8``."""
        root = Path(tempfile.mkdtemp(prefix="anatomy-"))
        weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        folders = {weights: root / weights for weights in ("fp32", "nf4", "int8")}
        self.model.set_attn_implementation("sdpa")  # a name that transformers knows without this package
        self.model.save_pretrained(folders["fp32"])
        self.model.set_attn_implementation("vitnb-sdpa")
        for weights in ("nf4", "int8"):
            small = _quantized(folders["fp32"], weights, quantization.modules_to_skip(self.model), self.device)
            quantization.disable_cpu_packing(small).save_pretrained(folders[weights])
        for folder in folders.values():
            self.processor.save_pretrained(folder)
        return folders

    def quantized(self, kept: list[str]) -> nn.Module:
        """The fitted model, loaded as NF4 with the modules ``kept`` left in 16 bits. The list is not checked."""
        return _quantized(self.exports["fp32"], "nf4", kept, self.device)

    def loaded(self, variant: str) -> loader.LoadedVariant:
        """A variant of the exports by its name, ready to run."""
        chosen = variants.parse(variant)
        return loader.load_variant(self.study, chosen, self.exports[chosen.weights if chosen.quantized else "fp32"])


def _quantized(folder: Path, weights: str, kept: list[str], on: torch.device) -> nn.Module:
    half = devices.compute_dtype(on)
    return AutoModelForImageClassification.from_pretrained(
        folder, dtype=half, quantization_config=quantization.bnb_config(weights, kept, half), device_map={"": on}
    ).eval()
