"""Imports torch without the packages that only training, tracing and compiling need.

That is a third of the import's time (`bench startup` measures both), and the import is most of a
boot. Knows names of torch's own
packages and nothing else of it. Only for versions that were tried: any other is imported whole.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

LEAN_VERSIONS = ("2.13",)
LEFT_OUT = (
    "torch._decomp", "torch._higher_order_ops", "torch._meta_registrations", "torch._native",
    "torch._strobelight", "torch.ao", "torch.distributions", "torch.export", "torch.hub",
    "torch.masked", "torch.mtia", "torch.onnx", "torch.optim", "torch.package", "torch.profiler",
    "torch.quantization", "torch.signal", "torch.testing", "torch.utils.data", "torch.xpu",
)  # fmt: skip
"""Packages, with everything below them, that no engine uses on a CPU."""

CUDA_DRIVER = Path("/dev/nvidiactl")


def import_lean() -> None:
    """After this `import torch` is free, but not whole: such a process cannot compile or train."""
    if "torch" in sys.modules or not is_lean_version():
        return import_whole()
    finder = _LeftOut()
    sys.meta_path.insert(0, finder)
    try:
        import_whole()
    finally:
        sys.meta_path.remove(finder)
        _remove_stand_ins()


def import_whole() -> None:
    import torch  # noqa: F401


def load_library() -> None:
    """Loads torch's own library, the longest single stretch of its import, beside other imports.

    By a foreign call of dlopen, which lets other threads run; `import` and ctypes.CDLL hold them
    up. What goes wrong here goes wrong again, with its reason, in the import.
    """
    folder = torch_folder()
    library = folder / "lib" / "libtorch_cpu.so" if folder else None
    if library is not None and library.exists():
        dlopen = ctypes.CDLL(None).dlopen
        dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        dlopen(os.fsencode(library), os.RTLD_LAZY)


# ---- what is installed, read from its files: importing it is what this must not do ---------------


def torch_folder() -> Path | None:
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def is_lean_version() -> bool:
    return _said_in_version(r"^__version__ = '(\d+\.\d+)") in LEAN_VERSIONS


def has_cuda_driver() -> bool:
    """A driver, and a torch that was built for it."""
    return CUDA_DRIVER.exists() and _said_in_version(r"^cuda\b.*= *(.*)") not in ("", "None")


def _said_in_version(pattern: str) -> str:
    folder = torch_folder()
    if folder is None:
        return ""
    text = (folder / "version.py").read_text(encoding="utf-8")
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else ""


# ---- stand-ins -----------------------------------------------------------------------------------


class _AnyClass(type):
    """Whatever is asked of a stand-in's class is there, and is of its kind."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, key: object) -> Any:
        return cls

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__


class _Anything(metaclass=_AnyClass):
    """For any name of a package left out: a base class, a decorator, a constant."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        return values[0] if len(values) == 1 and callable(values[0]) else object.__new__(cls)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return values[0] if len(values) == 1 and callable(values[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class StandIn(ModuleType):
    """Imports of names from it succeed; nothing uses them before it is gone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _LeftOut:
    """Finds and loads a stand-in for every module of the packages left out."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not any(name == left or name.startswith(left + ".") for left in LEFT_OUT):
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def _remove_stand_ins() -> None:
    """Whoever asks for one from here on is told that it is not there."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, StandIn):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if isinstance(vars(sys.modules.get(parent, sys)).get(child), StandIn):
                delattr(sys.modules[parent], child)
