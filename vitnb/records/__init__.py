"""Records: the parameters, results and machine of one run, as JSON."""

from vitnb import lazy_modules

SCHEMA = 2  # the shape of the records that are written; see ``schema``

__getattr__ = lazy_modules(__name__)
