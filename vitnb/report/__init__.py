"""The report: every result of a study on one HTML page."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
