"""Images: folders and pictures become splits, and splits become batches of pixels."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
