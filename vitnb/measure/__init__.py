"""Measurements: accuracy, latency, memory, roofline and profile of a variant."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
