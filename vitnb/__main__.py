"""Run ``python -m vitnb``: the same program as ``vitnb``."""

import sys

from vitnb.cli import main

if __name__ == "__main__":
    sys.exit(main())
