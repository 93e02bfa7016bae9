"""Analysis: from records to tables, tests and verdicts, without PyTorch."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
