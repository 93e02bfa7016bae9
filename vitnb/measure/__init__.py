"""Measure one variant at a time: accuracy, latency, memory, roofline and profile."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
