"""The engine process: `python -m pilotlight.engine.process --fd N`, started by the front.

Its first moment: torch is on its way before anything else is imported. What follows is
`engine/lifeline.py`.
"""

from __future__ import annotations

import gc
import os
import sys

from .torch_import import TorchImport


def main() -> int:
    # Nothing that a boot makes is garbage, and imports make much: the collector only costs time
    # until the model is there.
    gc.disable()
    torch_import = TorchImport()
    from .lifeline import live

    return live(torch_import)


if __name__ == "__main__":
    # No orderly teardown: torch's threads and the daemon threads would only delay the exit.
    code = main()
    sys.stderr.flush()
    os._exit(code)
