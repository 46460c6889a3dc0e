"""Finds and loads the shared library of this folder. Knows no tensors.

The library has a plain C interface, so one build serves every Python and every torch. Where it is
missing everything still runs on the reference; `missing_reason` says what to do about it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import cast

LIBRARY_PATH = Path(__file__).with_name("libpilotlight_cpu.so")
ABI_VERSION = 11

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
    library.pilotlight_run.restype = ctypes.c_int
    library.pilotlight_run.argtypes = [ctypes.c_int64, ctypes.c_void_p]
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
        handle.pilotlight_set_num_threads(num_threads)


@cache
def _entry(op: str) -> Callable[[int, bytes], int]:
    entry = getattr(_present(), f"pilotlight_{op}")
    entry.restype = ctypes.c_int
    entry.argtypes = [ctypes.c_int, ctypes.c_char_p]
    return cast(Callable[[int, bytes], int], entry)


def call(op: str, dtype_code: int, arguments: bytes) -> None:
    """Run `op` on its arguments as src/level.h lays them out, packed: quicker than fields."""
    _check(_entry(op)(dtype_code, arguments))
    if (recorded := _recorded.get()) is not None:
        recorded.append((op, dtype_code, arguments))


def _check(status: int) -> None:
    if status:
        error, message = _ERRORS[status]
        raise error(message)


# ---- calls that run again --------------------------------------------------------------------

RecordedCall = tuple[str, int, bytes]
"""Arguments of `call`."""

_recorded: ContextVar[list[RecordedCall] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[RecordedCall]]:
    """The calls of this thread that succeed meanwhile."""
    calls: list[RecordedCall] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


class _Call(ctypes.Structure):
    """Call in src/library.cpp."""

    _fields_ = (
        ("operation", ctypes.c_void_p),
        ("dtype_code", ctypes.c_int64),
        ("arguments", ctypes.c_char_p),
    )


class Program:
    """Recorded calls, run again many at a time: nothing of Python comes between them.

    Their arguments are addresses: whoever records keeps what lies there where it is.
    """

    def __init__(self, calls: list[RecordedCall]) -> None:
        self._arguments = [arguments for _, _, arguments in calls]
        self._calls = (_Call * len(calls))(
            *(_Call(_address(op), dtype_code, arguments) for op, dtype_code, arguments in calls)
        )
        self._run = _present().pilotlight_run

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, first: int, num_calls: int) -> None:
        """Some of the calls, one after the other."""
        address = ctypes.addressof(self._calls) + first * ctypes.sizeof(_Call)
        _check(self._run(num_calls, address))


def _address(op: str) -> int | None:
    return ctypes.cast(getattr(_present(), f"pilotlight_{op}"), ctypes.c_void_p).value
