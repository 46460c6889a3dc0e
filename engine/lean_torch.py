"""Imports of torch what computes on a CPU, and nothing else.

Most of torch's Python is for training, tracing, compiling and distributing. It takes two thirds of
the import's time (`bench startup` measures both), and the import is most of a boot. What is left
out satisfies the import by stand-ins, which are gone afterwards: whatever was taken from one is
taken away again, so that its use is an error and never a wrong answer. Such a process computes and
dispatches; it does not even print a tensor.

Knows names of torch's own modules and nothing else of it. Only for versions that were tried: any
other is imported whole.
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
KEPT = frozenset({
    "torch", "torch._C", "torch._VF", "torch._awaits", "torch._classes", "torch._environment",
    "torch._jit_internal", "torch._linalg_utils", "torch._lowrank", "torch._namedtensor_internals",
    "torch._opaque_base", "torch._ops", "torch._sources", "torch._storage_docs", "torch._tensor",
    "torch._tensor_str", "torch._torch_docs", "torch._utils", "torch._utils_internal",
    "torch._vendor", "torch._vendor.packaging", "torch._vendor.packaging._structures",
    "torch._vendor.packaging.version", "torch.autograd", "torch.autograd.grad_mode",
    "torch.functional", "torch.nn", "torch.nn._reduction", "torch.nn.functional", "torch.nn.grad",
    "torch.overrides", "torch.random", "torch.storage", "torch.torch_version", "torch.types",
    "torch.utils", "torch.utils._contextlib", "torch.utils._device", "torch.utils._import_utils",
    "torch.utils._python_dispatch", "torch.version",
})  # fmt: skip
"""Tensors, their operations and printing, dispatch modes, inference mode."""

LEFT_OUT_BESIDE = "torchgen"
"""torch's generator of code, which it imports for annotations."""


def _no() -> bool:
    return False


ANSWERS: dict[str, dict[str, Any]] = {
    "torch.cuda": {"is_available": _no, "is_initialized": _no},
    "torch.fx.experimental.sym_node": {"DynamicInt": type("DynamicInt", (), {})},
    "torch._library.simple_registry": {"find_torch_dispatch_rule": lambda operation, kind: None},
    "torch.jit": {"is_scripting": _no},
    "torch.jit._builtins": {"_register_builtin": lambda operation, name: None},
    "torch.library": {"_defs": frozenset(), "fallthrough_kernel": None},
}
"""What torch's core and this engine ask of modules that were left out, and the answers where there
is no CUDA and nothing is traced, scripted or customised. They have these names and no others."""

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
        return _no if name == "is_available" else _Anything


class _LeftOut:
    """Finds and loads a stand-in for every module of torch that is not kept."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if package != LEFT_OUT_BESIDE and (package != "torch" or is_kept(name)):
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def is_kept(name: str) -> bool:
    return name in KEPT or name.startswith("torch._C.")


def _remove_stand_ins() -> None:
    """From here on an import is in earnest, and a name from a stand-in is not defined."""
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        del sys.modules[name]
    for name in KEPT & sys.modules.keys():
        names = vars(sys.modules[name])
        for key in [key for key, value in names.items() if _is_stand_in(value)]:
            del names[key]
    for name, names in ANSWERS.items():
        _place(name, names)


def _place(name: str, names: dict[str, Any]) -> None:
    """A module with these names and no others, and packages above it with nothing."""
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = []
    vars(module).update(names)
    parent, _, child = name.rpartition(".")
    if parent not in sys.modules:
        _place(parent, {})
    setattr(sys.modules[parent], child, module)


def _is_stand_in(value: object) -> bool:
    return value is _Anything or isinstance(value, StandIn) or type(value) is _Anything
