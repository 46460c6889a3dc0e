"""`python -m pilotlight` is the command `pilotlight`."""

import sys

from .cli import main

sys.exit(main())
