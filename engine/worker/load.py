"""From what was found to a Runner: device, weights, kernels, cache.

Knows files and the machine; knows no process and no requests. Every stretch is reported by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from msgspec.structs import replace

from ...kernels.probe import Probe
from ...kernels.table import Attention, Kernels, bind
from ..boot_report import BootReport, Unheard
from ..config import EngineConfig
from ..errors import ConfigError
from ..found_weights import FoundWeights
from ..host_cpus import usable_cpus
from ..last_plan import read_plan
from ..messages import ModelFacts
from ..models.decoder import Decoder
from ..models.recipes import recipes
from ..models.weights import ModelWeights
from ..speculation import MAX_STEP_ROWS
from .graphs import GraphBackend
from .kv_cache import KvPlan, allocate, cache_dtype, plan_kv_cache, smallest_plan
from .loading import begin_loading
from .memory import GIB, card_memory, check_weights_fit
from .rehearsal import WorkingMemory, meter_for, rehearse
from .runner import Runner
from .staging import staging_for

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
FP8_CAPABILITY = (8, 9)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def prepare() -> None:
    """What needs torch but no model: modules, and the threads that kernels run on."""
    bind(CPU, torch.float32)


def load_runner(
    config: EngineConfig,
    found: FoundWeights,
    report: BootReport,
    pulse: Callable[[], None],
    runs_ahead: bool = False,
) -> tuple[Runner, ModelFacts]:
    """Loads what was found. Raises SetupError. `pulse` is called per layer of each step."""
    device, dtype = checked_device(found.target.device), DTYPES[found.target.dtype]
    _set_threads(config.num_threads, device)
    if device.type == "cuda":
        check_weights_fit(found.num_bytes, config, card_memory(device))
    with torch.inference_mode():
        loading = begin_loading(found, device, dtype, report)
    try:
        made = _made_ready(config, found, loading.weights, device, report, pulse, runs_ahead)
        weights_facts = loading.finish(report)
    except BaseException:
        loading.abandon()
        raise
    runner, facts = made
    if device.type == "cuda":
        _log_memory(found.num_bytes, facts)
    return runner, replace(facts, weights=weights_facts)


def _made_ready(
    config: EngineConfig,
    found: FoundWeights,
    weights: ModelWeights,
    device: torch.device,
    report: BootReport,
    pulse: Callable[[], None],
    runs_ahead: bool,
) -> tuple[Runner, ModelFacts]:
    """Everything but the weights' values: graphs hold addresses, and are captured meanwhile."""
    model, dtype = found.model, DTYPES[found.target.dtype]
    report("bind_kernels", 0, 0, f"{device.type}, {found.target.dtype}")
    try:
        probe = Probe(device, dtype, config.block_size)
        kernels = bind(device, dtype, config.deterministic, _attention_of(config), probe)
    except ValueError as error:
        asked = f"attention is {config.attention!r}, prompt_attention {config.prompt_attention!r}"
        raise ConfigError(f"{asked}: {error}") from error
    kv_dtype = cache_dtype(config, model, dtype, found.target.layout)
    _check_cache(kv_dtype, device)

    def runner_over(plan: KvPlan, report: BootReport) -> Runner:
        report("allocate_kv", 0, 0, "")
        graphs = _graphs_for(device, kernels, kv_dtype)
        caches = allocate(plan, model, device, kv_dtype, int(graphs is not None))
        if graphs is not None:
            report("capture_graphs", 0, 0, "")
        return Runner(
            Decoder(model, weights, kernels, plan.context_len, pulse),
            caches,
            context_len=plan.context_len,
            block_size=plan.block_size,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            max_num_drafts=MAX_STEP_ROWS,
            staging=staging_for(device),
            graphs=graphs,
            runs_ahead=runs_ahead,
        )

    card = card_name(device)
    last = read_plan(found, config, card)
    with torch.inference_mode():
        if last is not None:
            working = WorkingMemory(last.graph_bytes, last.activation_bytes)
        else:
            smallest = smallest_plan(config, model, kv_dtype)
            working = _rehearsed(config, device, report, lambda: runner_over(smallest, Unheard()))
        plan = plan_kv_cache(config, model, device, kv_dtype, last, working.num_bytes)
        runner = runner_over(plan, report)
    return runner, _facts(found, kernels, plan, kv_dtype, card, working)


def _rehearsed(
    config: EngineConfig, device: torch.device, report: BootReport, make: Callable[[], Runner]
) -> WorkingMemory:
    """Nothing where nothing depends on it. `make`: a runner whose cache is next to nothing."""
    meter = meter_for(device)
    if meter is None or config.kv_cache_bytes:
        return WorkingMemory(0, 0)
    report("measure_memory", 0, 0, "")
    return rehearse(make, meter)


def _attention_of(config: EngineConfig) -> Attention:
    return Attention(config.attention, config.prompt_attention, config.block_size)


def _check_cache(kv_dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError where the device does not know such numbers."""
    if kv_dtype is not torch.float8_e4m3fn:
        return
    if device.type == "cpu":
        logger.warning(
            "--kv-cache-dtype fp8 is slow on a CPU, which has no kernel for it; see int8"
        )
    elif torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ConfigError(
            f"kv_cache_dtype is fp8: {torch.cuda.get_device_name(device)} does not compute with it "
            "(Ada and Hopper do); choose --kv-cache-dtype int8"
        )


def _log_memory(weight_bytes: int, facts: ModelFacts) -> None:
    parts = (weight_bytes, facts.kv_cache_bytes, facts.graph_bytes, facts.activation_bytes)
    logger.info(
        "GiB of the card: weights %.2f, KV cache %.2f, graphs %.2f, activations %.2f",
        *(num_bytes / GIB for num_bytes in parts),
    )


def _graphs_for(
    device: torch.device, kernels: Kernels, kv_dtype: torch.dtype
) -> GraphBackend | None:
    """None on a CPU, where steps are recorded, and where an operation waits for the host."""
    if device.type != "cuda":
        return None
    suffix = "_int8" if kv_dtype is torch.int8 else ""
    # These, as the reference computes them, ask the host what is in their tensors.
    asking = (f"rope_store_kv{suffix}", f"paged_attention{suffix}")
    on_reference = [op for op in asking if op in kernels.on_reference]
    if on_reference:
        logger.info("decode steps run without graphs: no kernels for %s", ", ".join(on_reference))
        return None
    from .cuda_graphs import CudaGraphs

    return CudaGraphs(device)


def checked_device(name: str) -> torch.device:
    """The device as torch sees it. Raises ConfigError where torch cannot use it."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda: this torch has no usable CUDA device; choose --device cpu"
        )
    return torch.device(name)


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _set_threads(num_threads: int, device: torch.device) -> None:
    """0: as torch chooses, which is one for each core, but no more than may run at once."""
    if device.type == "cpu":
        torch.set_num_threads(num_threads or min(torch.get_num_threads(), usable_cpus()))


def _facts(
    found: FoundWeights,
    kernels: Kernels,
    plan: KvPlan,
    kv_dtype: torch.dtype,
    card: str,
    working: WorkingMemory,
) -> ModelFacts:
    model, target = found.model, found.target
    listed = recipes(model, target.layout)
    num_parameters = sum(math.prod(r.shape) for r in listed if r.role in ("", "words"))
    float_bytes = num_parameters * DTYPES[target.dtype].itemsize
    return ModelFacts(
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        num_parameters=num_parameters,
        weight_bytes=found.num_bytes if model.quantized else float_bytes,
        context_len=plan.context_len,
        eos_token_ids=list(model.eos_token_ids),
        device=target.device,
        dtype=target.dtype,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        kv_cache_bytes=plan.num_bytes,
        kv_cache_dtype=dtype_name(kv_dtype),
        kernels=kernels.choices,
        artefact=found.origin,
        quantisation=str(model.quantization) if model.quantized else "",
        card=card,
        graph_bytes=working.graph_bytes,
        activation_bytes=working.activation_bytes,
    )
