"""Quantised checkpoints written by the formats' formulas alone: nothing of the product is used.

GPTQ as GPTQModel documents it (model_dequant.py, `convert_gptq_file`), AWQ as AutoAWQ packs it
(modules/linear/gemm.py, `from_linear`), pack-quantized as compressed-tensors (`pack_to_int32`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Kind:
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    version: int = 1
    scales: torch.dtype = torch.float16
    stored: str = "gptq"

    def config(self) -> dict[str, Any]:
        if self.stored == "awq":
            return {
                "quant_method": "awq",
                "bits": self.bits,
                "group_size": self.group_size,
                "version": "gemm",
                "zero_point": True,
                "modules_to_not_convert": None,
            }
        if self.stored == "packed":
            return packed_config(self)
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
        }


def packed_config(kind: Kind) -> dict[str, Any]:
    strategy = "channel" if kind.group_size == -1 else "group"
    weights = {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": kind.sym,
        "strategy": strategy,
        "group_size": None if strategy == "channel" else kind.group_size,
        "actorder": "group" if kind.desc_act else None,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def quantize(weight: Tensor, kind: Kind, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """[N, K] -> the tensors of the module, and the float64 [N, K] that they mean."""
    w = weight.double().T  # [K, N]
    num_inputs, num_outputs = w.shape
    group = num_inputs if kind.group_size == -1 else kind.group_size
    g_idx = torch.arange(num_inputs) // group
    if kind.desc_act:
        g_idx = g_idx[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(seed))]
    num_groups, top = int(g_idx.max()) + 1, 2**kind.bits - 1
    scales, zeros = torch.empty(num_groups, num_outputs), torch.empty(num_groups, num_outputs)
    for g in range(num_groups):
        rows = w[g_idx == g]
        if kind.sym:
            scales[g], zeros[g] = 2 * rows.abs().amax(0) / top + 1e-6, (top + 1) // 2
        else:
            low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
            scales[g] = (high - low) / top + 1e-6
            zeros[g] = (-low / scales[g]).round().clamp(0, top)
    scales = scales.to(kind.scales)
    q = ((w / scales.double()[g_idx]).round() + zeros[g_idx]).clamp(0, top).long()
    meant = scales.double()[g_idx] * (q.double() - zeros.double()[g_idx])
    store = {"gptq": gptq_tensors, "awq": awq_tensors, "packed": packed_tensors}[kind.stored]
    return store(q, zeros.long(), scales, g_idx.to(torch.int32), kind), meant.T


def gptq_tensors(
    q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, kind: Kind
) -> dict[str, Tensor]:
    stored = (zeros - int(kind.version == 1)) & (2**kind.bits - 1)
    return {
        "qweight": words(q, kind.bits, along=0),
        "qzeros": words(stored, kind.bits, along=1),
        "scales": scales,
        "g_idx": g_idx,
    }


def awq_tensors(
    q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, kind: Kind
) -> dict[str, Tensor]:
    return {"qweight": awq_words(q), "qzeros": awq_words(zeros), "scales": scales}


def awq_words(fields: Tensor) -> Tensor:
    """[R, C] -> int32 [R, C / 8]: eight columns a word, in AutoAWQ's order."""
    out = torch.zeros(fields.shape[0], fields.shape[1] // 8, dtype=torch.int64)
    for column in range(out.shape[1]):
        for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            out[:, column] |= fields[:, column * 8 + place] << (4 * i)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def packed_tensors(
    q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor, kind: Kind
) -> dict[str, Tensor]:
    """Signed values with an offset are what q and zeros are already."""
    tensors = {
        "weight_packed": words(q.T, kind.bits, along=1),
        "weight_scale": scales.T.contiguous(),
        "weight_shape": torch.tensor([q.shape[1], q.shape[0]]),
    }
    if not kind.sym:
        tensors["weight_zero_point"] = words(zeros.T, kind.bits, along=0)
    if kind.desc_act:
        tensors["weight_g_idx"] = g_idx
    return tensors


def words(fields: Tensor, bits: int, along: int) -> Tensor:
    """Fields of `bits` into int32 along a dimension, the lowest first, one by one."""
    per_word = 32 // bits
    fields = fields.movedim(along, 0)
    out = torch.zeros(fields.shape[0] // per_word, *fields.shape[1:], dtype=torch.int64)
    for i in range(fields.shape[0]):
        out[i // per_word] |= fields[i] << (bits * (i % per_word))
    signed = torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
    return signed.movedim(0, along).contiguous()


def write(source: Path, folder: Path, kind: Kind, skipped: tuple[str, ...] = ()) -> Path:
    """A GPTQ checkpoint of `source`'s, and beside it, in `<folder>-float`, the floats it means."""
    meant_folder = folder.with_name(folder.name + "-float")
    for target in (folder, meant_folder):
        shutil.copytree(source, target)
    floats = load_file(source / "model.safetensors")
    integers, meant = dict(floats), dict(floats)
    for seed, (name, weight) in enumerate(sorted(floats.items())):
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS) or any(s in module for s in skipped):
            continue
        # What is computed together is ordered alike, as calibration does it.
        tensors, value = quantize(weight, kind, seed=0 if kind.desc_act else seed)
        del integers[name]
        integers |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        meant[name] = value.float().contiguous()
    save_file(integers, folder / "model.safetensors")
    save_file(meant, meant_folder / "model.safetensors")
    edit_config(folder, quantization_config=kind.config())
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Tensors by name, with "/" for "."; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        tensors.pop(name.replace("/", "."), None)
        if value is not None:
            tensors[name.replace("/", ".")] = value
    save_file(tensors, path)
