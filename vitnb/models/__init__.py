"""Models: a checkpoint becomes a variant that is ready to run."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
