"""Mixed precision: how sensitive each layer is, and which layers to keep."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
