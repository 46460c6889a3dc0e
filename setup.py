"""The repository root is the package `pilotlight`; the native library is built by CMake beside it."""

from setuptools import setup

setup(package_dir={"pilotlight": "."})
