"""The instruction sets that the native library has code for. Loads nothing: command lines ask."""

from __future__ import annotations

LEVELS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")
"""Best first; `native.levels` are those of this machine."""
