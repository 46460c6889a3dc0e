"""Finds and loads the shared library of this folder. Knows no tensors.

The library has a plain C interface, so one build serves every Python and every torch. Where it is
missing everything still runs on the reference; `missing_reason` says what to do about it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

LIBRARY_PATH = Path(__file__).with_name("libpilotlight_cpu.so")
ABI_VERSION = 4
OPENMP_LIBRARIES = ("libgomp", "libiomp5")

_ERRORS = {
    1: (MemoryError, "the CPU kernels could not get memory"),
    2: (IndexError, "a position, slot, block or length lies outside its table or cache"),
}


def load(path: Path) -> ctypes.CDLL | str:
    """The library at `path`, or why it cannot be used and what to do."""
    if not path.exists():
        return (
            f"{path.name} is not there: no compiler was found when Pilotlight was installed; "
            "install g++ (11 or later) and run pip install again"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.pilotlight_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({error}); run pip install again"
    if version != ABI_VERSION:
        wanted = f"it has interface {version}, this Pilotlight needs {ABI_VERSION}"
        return f"{path.name} is of another version ({wanted}); run pip install again"
    return _declared(library)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.pilotlight_level.restype = ctypes.c_char_p
    library.pilotlight_level_name.restype = ctypes.c_char_p
    library.pilotlight_level_name.argtypes = [ctypes.c_int]
    library.pilotlight_use_level.restype = ctypes.c_bool
    library.pilotlight_use_level.argtypes = [ctypes.c_char_p]
    library.pilotlight_set_num_threads.restype = None
    library.pilotlight_set_num_threads.argtypes = [ctypes.c_int]
    library.pilotlight_use_openmp.restype = None
    library.pilotlight_use_openmp.argtypes = [ctypes.c_void_p]
    return library


@cache
def _loaded() -> ctypes.CDLL | str:
    return load(LIBRARY_PATH)


def library() -> ctypes.CDLL | None:
    loaded = _loaded()
    return None if isinstance(loaded, str) else loaded


def missing_reason() -> str | None:
    """Why there is no library, and what to do about it; None when there is one."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def _present() -> ctypes.CDLL:
    loaded = _loaded()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def level() -> str | None:
    """The instruction set that the native code uses now, None without a library."""
    handle = library()
    return handle.pilotlight_level().decode() if handle else None


def levels() -> list[str]:
    """The instruction sets usable on this machine, best first."""
    handle = library()
    if handle is None:
        return []
    names: list[str] = []
    while name := handle.pilotlight_level_name(len(names)):
        names.append(name.decode())
    return names


def force_level(name: str) -> None:
    """Use the instruction set `name` from now on, for tests and measurements."""
    if not _present().pilotlight_use_level(name.encode()):
        raise ValueError(f"no level {name!r} on this machine; there are {', '.join(levels())}")


def set_num_threads(num_threads: int) -> None:
    """Let the native code use `num_threads` threads, this one included."""
    if handle := library():
        handle.pilotlight_use_openmp(_openmp_parallel())
        handle.pilotlight_set_num_threads(num_threads)


@cache
def _openmp_parallel() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP library this process has loaded, if it has one."""
    for path in _mapped_libraries():
        if Path(path).name.startswith(OPENMP_LIBRARIES):
            function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            return ctypes.cast(function, ctypes.c_void_p).value if function else None
    return None


def _mapped_libraries() -> list[str]:
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({line.split(maxsplit=5)[-1] for line in lines if ".so" in line})


@cache
def _entry(op: str) -> Callable[[int, bytes], int]:
    entry = getattr(_present(), f"pilotlight_{op}")
    entry.restype = ctypes.c_int
    entry.argtypes = [ctypes.c_int, ctypes.c_char_p]
    return cast(Callable[[int, bytes], int], entry)


def call(op: str, dtype_code: int, arguments: bytes) -> None:
    """Run `op` on its arguments as src/level.h lays them out, packed: quicker than fields."""
    status = _entry(op)(dtype_code, arguments)
    if status:
        error, message = _ERRORS[status]
        raise error(message)
