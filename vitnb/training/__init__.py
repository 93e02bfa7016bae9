"""Training: LoRA adapters, their loop and exports, simple baselines, and pretraining."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
