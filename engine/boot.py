"""Puts an engine together: runner, scheduler, one real token. The only place that knows both sides.

torch is imported inside, never at the top, so that a caller can report before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..weights_cache.manifest import read_manifest
from .config import EngineConfig
from .core import EngineCore
from .errors import EngineError
from .messages import FinishReason, ModelFacts, Submit
from .models.config import read_model_config
from .models.names import check_tensors
from .sampling_params import SamplingParams
from .scheduler import Scheduler

Report = Callable[[str, int, int, str], None]
"""phase, bytes done, bytes in all, detail."""


def boot(
    config: EngineConfig, report: Report, pulse: Callable[[], None]
) -> tuple[EngineCore, ModelFacts]:
    """From a configuration to an engine that has generated a token. Raises SetupError."""
    check(config, report)
    report("import_torch", 0, 0, "")
    from .worker.load import load_runner

    runner, facts = load_runner(config, report, pulse)
    scheduler = Scheduler(
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        context_len=facts.context_len,
        eos_token_ids=facts.eos_token_ids,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        prefix_cache=config.prefix_cache,
    )
    core = EngineCore(scheduler, runner)
    report("warm", 0, 0, "")
    warm(core)
    return core, facts


def check(config: EngineConfig, report: Report) -> None:
    """Everything that can be refused from headers alone, before a second is spent on torch."""
    report("check", 0, 0, "")
    folder = Path(config.model)
    check_tensors(read_model_config(folder), read_manifest(folder))


def warm(core: EngineCore) -> None:
    """Generates one real token: READY means that this worked."""
    began_s = time.monotonic()
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    core.submit(Submit("warm-up", [0], sampling, cache_salt="warm-up"))
    record = core.step()
    reasons = [output.finish_reason for output in record.outputs] if record else []
    if reasons != [FinishReason.LENGTH]:
        elapsed_s = time.monotonic() - began_s
        raise EngineError(f"no token came out of the warm-up step ({reasons}, {elapsed_s:.1f} s)")
