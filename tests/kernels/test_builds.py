"""Builds of the native library for tests: with sanitizers, and of levels this machine lacks.

Both try every small case of every operation in a process of their own. Knows no operation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pilotlight.kernels.cpu import native

ROOT = Path(__file__).parents[2]
LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
TIMEOUT_S = 300

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(
        native.library() is None, reason=native.missing_reason() or "the library is there"
    ),
]


def tool(name: str) -> str:
    """CMake and Ninja may have come from PyPI, into the folder of this interpreter."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return shutil.which(name, path=path) or pytest.skip(f"{name} is not installed")


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def built(folder: Path, levels: list[str], option: str) -> Path:
    cmake = tool("cmake")
    options = {
        "PILOTLIGHT_OUTPUT_DIR": folder,
        "PILOTLIGHT_LEVELS": ";".join(levels),
        option: "ON",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    run(cmake, "-S", ROOT, "-B", folder / "build", "-G", "Ninja", *defined)
    run(cmake, "--build", folder / "build")
    return folder / native.LIBRARY_PATH.name


def tried(library: Path, **environment: str) -> str:
    return run(sys.executable, "-m", "pilotlight.tests.kernels.trials", library, **environment)


def sanitizer_runtime() -> str:
    """What must be loaded before everything else in a process that did not expect it."""
    found = run(tool("g++"), "-print-file-name=libasan.so").strip()
    return found if Path(found).is_absolute() else pytest.skip("g++ has no AddressSanitizer")


def test_nothing_is_out_of_bounds_or_undefined(tmp_path: Path) -> None:
    runtime = sanitizer_runtime()
    levels = [level for level in LEVELS if level in native.levels()]
    library = built(tmp_path, levels, "PILOTLIGHT_SANITIZE")
    # Python itself never frees all; the rest stops at the first mistake.
    checks = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    assert " trials agree at " in tried(library, LD_PRELOAD=runtime, **checks)


def test_levels_that_this_machine_lacks_agree_too(tmp_path: Path) -> None:
    missing = [level for level in LEVELS if level not in native.levels()]
    if "avx2" in missing or not missing:
        pytest.skip("none is missing that AVX2 could stand in for")
    library = built(tmp_path, missing, "PILOTLIGHT_EMULATE")
    assert ", ".join(reversed(missing)) in tried(library)
