"""From an EngineConfig to a Runner: device and dtype, weights, kernels, cache.

Knows files and the machine; knows no process and no requests. Every stretch is reported by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ...kernels.table import Kernels, bind
from ...weights_cache.manifest import Manifest, read_manifest
from ...weights_cache.stream import MappedWeights
from ..config import EngineConfig
from ..errors import ConfigError
from ..messages import ModelFacts
from ..models.config import ModelConfig, read_model_config
from ..models.decoder import Decoder
from ..models.names import check_tensors
from ..models.weights import ModelWeights, WeightsLoader
from .kv_cache import KvPlan, allocate, plan_kv_cache
from .runner import Runner

Report = Callable[[str, int, int, str], None]
"""phase, bytes done, bytes in all, detail."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_runner(
    config: EngineConfig, report: Report, pulse: Callable[[], None]
) -> tuple[Runner, ModelFacts]:
    """Loads the model of `config`. Raises SetupError. `pulse` is called per layer of each step."""
    report("read_config", 0, 0, "")
    folder = Path(config.model)
    model_config, manifest = read_model_config(folder), read_manifest(folder)
    check_tensors(model_config, manifest)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, model_config)
    _set_threads(config.num_threads, device)
    weights = _load_weights(model_config, manifest, device, dtype, report)
    report("bind_kernels", 0, 0, f"{device.type}, {dtype_name(dtype)}")
    kernels = bind(device, dtype)
    report("allocate_kv", 0, 0, "")
    plan = plan_kv_cache(config, model_config, device, dtype)
    with torch.inference_mode():
        runner = Runner(
            Decoder(model_config, weights, kernels, plan.context_len, pulse),
            allocate(plan, model_config, device, dtype),
            context_len=plan.context_len,
            block_size=plan.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            device=device,
        )
    return runner, _facts(model_config, manifest, kernels, plan, device, dtype)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a usable device, else the CPU."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("device is 'cuda': this machine or this torch has no usable CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and has_cuda) else "cpu")


def choose_dtype(name: str, device: torch.device, model: ModelConfig) -> torch.dtype:
    """`auto` is the checkpoint's own on CUDA; on a CPU bfloat16 where the CPU multiplies it."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return DTYPES.get(model.checkpoint_dtype, torch.bfloat16)
    is_half = model.checkpoint_dtype in ("bfloat16", "float16")
    return torch.bfloat16 if is_half and _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_threads(num_threads: int, device: torch.device) -> None:
    if num_threads > 0 and device.type == "cpu":
        torch.set_num_threads(num_threads)


def _load_weights(
    model_config: ModelConfig,
    manifest: Manifest,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> ModelWeights:
    total = manifest.num_bytes
    report("load_weights", 0, total, "")
    loader = WeightsLoader(
        MappedWeights(manifest), device, dtype, lambda done: report("load_weights", done, total, "")
    )
    with torch.inference_mode():
        return loader.load(model_config)


def _facts(
    model: ModelConfig,
    manifest: Manifest,
    kernels: Kernels,
    plan: KvPlan,
    device: torch.device,
    dtype: torch.dtype,
) -> ModelFacts:
    num_parameters = sum(_num_items(t.shape) for t in manifest.tensors.values())
    return ModelFacts(
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        num_parameters=num_parameters,
        weight_bytes=num_parameters * dtype.itemsize,
        context_len=plan.context_len,
        eos_token_ids=list(model.eos_token_ids),
        device=str(device),
        dtype=dtype_name(dtype),
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        kv_cache_bytes=plan.num_bytes,
        kernels=kernels.choices,
    )


def _num_items(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
