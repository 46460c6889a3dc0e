"""`python -m pilotlight.engine.build_artefact`: writes an artefact behind a server that is READY.

A process of its own, at the lowest priority and on one thread: the engine loses no more than what
the machine has to spare, and a build that fails costs nobody anything. It ends with its engine; the
next boot goes on from what it had written. Knows how to build; knows no channel.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from ..weights_cache.store import Store
from .config import EngineConfig
from .end_with_parent import end_with_parent
from .errors import SetupError
from .found_weights import FoundWeights
from .lean_torch import import_lean
from .logs import log_json_lines

logger = logging.getLogger("pilotlight.engine.build_artefact")


def start_behind(config: EngineConfig, found: FoundWeights) -> bool:
    """Starts it where the model came from its checkpoint and there is a cache to write to."""
    if not config.cache or found.leased is not None:
        return False
    if not Store(Path(config.cache)).is_writable:
        logger.info("no artefact is written: %s is read-only", config.cache)
        return False
    module = (sys.executable, "-m", "pilotlight.engine.build_artefact")
    target = ("--device", found.target.device, "--dtype", found.target.dtype)
    head = ("--head-dtype", config.head_dtype)
    arguments = ("--cache", config.cache, *target, *head, str(found.folder))
    subprocess.Popen((*module, *arguments), stdin=subprocess.DEVNULL)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Started by an engine; see `pilotlight cache`.")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--head-dtype", required=True)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    end_with_parent()
    os.nice(19)
    log_json_lines("artefact", "info")
    began_s = time.monotonic()
    import_lean()
    import torch

    from .models.artefact import build

    torch.set_num_threads(1)
    try:
        asked = arguments.device, arguments.dtype, arguments.head_dtype
        built = build(Store(arguments.cache), arguments.folder, *asked)
    except SetupError as error:
        logger.warning("no artefact was written: %s", error)
        return 1
    fields = {"key": built.key, "bytes": built.num_bytes, "s": round(time.monotonic() - began_s, 3)}
    logger.info("the artefact is written: the next boot maps it", extra={"fields": fields})
    return 0


if __name__ == "__main__":
    sys.exit(main())
