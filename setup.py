"""Builds the package: the repository root is `pilotlight`, and CMake builds its native libraries.

They are optional. Without a C++ compiler everything runs on the reference kernels, and
`pilotlight doctor` says what that costs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS_FOLDER = Path("kernels") / "cpu"
READER_FOLDER = Path("weights_cache") / "reader"
FOLDERS = (
    "bench",
    "client",
    "demo",
    "engine",
    "kernels",
    "proto",
    "quantize",
    "server",
    "weights_cache",
)


class CMakeBuild(build_ext):
    """Runs CMake; a failure is a warning."""

    def run(self) -> None:
        is_in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT if is_in_place else Path(self.build_lib).resolve() / "pilotlight"
        try:
            self._build(package)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"warning: the native libraries were not built: {error}", file=sys.stderr)
            print("warning: install g++ and install again to have them", file=sys.stderr)

    def _build(self, package: Path) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        kernels, reader = package / KERNELS_FOLDER, package / READER_FOLDER
        for folder in (kernels, reader):
            folder.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        folders = [f"-DPILOTLIGHT_OUTPUT_DIR={kernels}", f"-DPILOTLIGHT_READER_DIR={reader}"]
        options = ["-DCMAKE_BUILD_TYPE=Release", *folders]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, *generator, *options], check=True)
        subprocess.run(["cmake", "--build", build, "--parallel"], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=[*FOLDERS, *(f"{name}.*" for name in FOLDERS)])
    return ["pilotlight", *(f"pilotlight.{name}" for name in found)]


setup(
    package_dir={"pilotlight": "."},
    packages=packages(),
    package_data={
        "pilotlight": ["py.typed"],
        "pilotlight.demo": ["model/*", "README.md"],
        "pilotlight.proto": ["*.proto", "*.pyi"],
        "pilotlight.kernels.cpu": ["src/*"],
        "pilotlight.weights_cache.reader": ["reader.cpp"],
    },
    ext_modules=[Extension("pilotlight.kernels.cpu.libpilotlight_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
