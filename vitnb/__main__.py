"""TODO."""

from vitnb.cli import main

raise SystemExit(main())
