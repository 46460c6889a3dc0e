"""A quantised checkpoint on disk, in the layout that GPTQModel, vLLM and transformers read.

Knows tensors' names and the format; knows no rounding.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..engine.errors import ConfigError, NotEnoughDisk
from ..engine.models.quantization import Scheme
from ..kernels.quantized import join_fields
from .rounding import Integers

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def tensors_of(module: str, found: Integers, scheme: Scheme) -> dict[str, Tensor]:
    """qweight, qzeros, scales, g_idx. Format v1 stores z - 1, a true 0 as all ones."""
    zeros = (found.zeros.T.long() - int(scheme.adds_one)) & (2**scheme.bits - 1)
    return {
        f"{module}.qweight": join_fields(found.q.T, scheme.bits),
        f"{module}.qzeros": join_fields(zeros.T, scheme.bits).T.contiguous(),
        f"{module}.scales": found.scales.T.half().contiguous(),
        f"{module}.g_idx": found.g_idx.to(torch.int32),
    }


def described(scheme: Scheme) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.is_symmetric,
        "desc_act": scheme.has_order,
        "checkpoint_format": "gptq" if scheme.adds_one else "gptq_v2",
        "lm_head": False,
    }


def check_target(source: Path, out: Path) -> None:
    """Raises before anything was computed."""
    if out.exists():
        raise ConfigError(f"OUT is {str(out)!r}: it is there already; name a new folder")
    if not out.parent.is_dir():
        raise ConfigError(f"OUT is {str(out)!r}: {out.parent} is not a folder")
    needed = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise NotEnoughDisk(f"{out.parent} has {free} bytes free, up to {needed} are needed")


def write_checkpoint(source: Path, out: Path, tensors: dict[str, Tensor], scheme: Scheme) -> None:
    """Whole or not at all: under another name, then renamed."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = described(scheme)
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        text = json.dumps(described(scheme), indent=1) + "\n"
        (partial / "quantize_config.json").write_text(text)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
