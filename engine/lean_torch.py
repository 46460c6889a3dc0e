"""Imports torch without what only its compilers need: half of the time that the import takes.

Knows names of torch's own modules and nothing else of it. A name that a version of torch does not
have costs nothing: its stand-in is simply never asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER_MODULES = (
    "torch._meta_registrations",
    "torch._decomp",
    "torch._decomp.decompositions",
    "torch.export",
)
"""Shape functions, decompositions and export: for tracing and compiling, which no engine does."""


class StandIn(ModuleType):
    """Imports of names from it succeed; nothing uses them before it is gone."""

    __path__: list[str] = []  # noqa: RUF012 - a package, for `import name.part`

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def import_torch() -> None:
    """After this `import torch` is free. Who wants to compile calls `import_rest` first."""
    if "torch" in sys.modules:
        return
    stand_ins = [name for name in COMPILER_MODULES if name not in sys.modules]
    sys.modules.update({name: StandIn(name) for name in stand_ins})
    try:
        import torch
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
    for name in stand_ins:
        if isinstance(vars(torch).get(name.removeprefix("torch.")), StandIn):
            delattr(torch, name.removeprefix("torch."))


def import_rest() -> None:
    """What was left out, in the one order in which these modules find each other."""
    for name in COMPILER_MODULES:
        import_module(name)
