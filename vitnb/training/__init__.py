"""Training: LoRA adapters, loop, exports, baselines and pretraining."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
