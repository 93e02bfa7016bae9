"""Records: what one run was asked, what it found and what it ran on, as JSON."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
