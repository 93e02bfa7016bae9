"""Two records, or two outputs of a study, side by side: ``vitnb diff``."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
