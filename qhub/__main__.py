"""`python -m qhub` is the `qhub` command."""

from __future__ import annotations

import sys

from qhub.cli import main

if __name__ == "__main__":
    sys.exit(main())
