"""Records: the parameters, results and machine of one run, as JSON."""

from vitnb import lazy_modules

__getattr__ = lazy_modules(__name__)
