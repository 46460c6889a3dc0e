"""Puts an engine together: weights, runner, scheduler, one real token. Knows both sides.

torch is imported inside, never at the top: by a thread of the process that began with its first
breath (`TorchImport`), while files are looked at and bytes move.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from . import target
from .config import EngineConfig
from .core import EngineCore
from .errors import BadArtefact, EngineError
from .found_weights import FoundWeights, find_weights
from .lean_torch import import_torch
from .messages import FinishReason, ModelFacts, Submit
from .sampling_params import SamplingParams
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

Report = Callable[[str, int, int, str], None]
"""phase, bytes done, bytes in all, detail."""


@dataclass(frozen=True, slots=True)
class Booted:
    """An engine that has generated a token, and what its weights rest on."""

    core: EngineCore
    facts: ModelFacts
    weights: FoundWeights


class TorchImport:
    """torch on its way in a thread of its own: every engine needs it, whatever it will load."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="import-torch", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Raises what the import raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if target.has_cuda_driver():
                import torch  # noqa: F401
            else:
                import_torch()
        except BaseException as error:
            self._error = error


def stand_by(torch_import: TorchImport, report: Report) -> None:
    """Everything that can be done without a model."""
    report("import_torch", 0, 0, "")
    torch_import.wait()
    from .worker import load

    load.prepare()


def boot(
    config: EngineConfig,
    report: Report,
    pulse: Callable[[], None],
    torch_import: TorchImport | None = None,
) -> Booted:
    """From a configuration to an engine that has generated a token. Raises SetupError.

    What can be refused from headers alone is refused before torch is waited for.
    """
    torch_import = torch_import or TorchImport()
    report("check", 0, 0, "")
    try:
        return _boot(config, torch_import, report, pulse)
    except BadArtefact as error:
        # It was condemned when it was found out: what is left is the checkpoint.
        logger.warning("%s; the checkpoint itself is loaded", error)
        return _boot(config, torch_import, report, pulse)


def _boot(
    config: EngineConfig, torch_import: TorchImport, report: Report, pulse: Callable[[], None]
) -> Booted:
    weights = find_weights(config)
    try:
        weights.start_moving()
        report("import_torch", 0, 0, "")
        torch_import.wait()
        core, facts = _core(config, weights, report, pulse)
        report("warm", 0, 0, "")
        warm(core)
        report("verify", 0, 0, config.verify)
        weights.finish_verifying()
    except BaseException:
        weights.close()
        raise
    return Booted(core, facts, weights)


def _core(
    config: EngineConfig, weights: FoundWeights, report: Report, pulse: Callable[[], None]
) -> tuple[EngineCore, ModelFacts]:
    from .worker.load import load_runner

    runner, facts = load_runner(config, weights, report, pulse)
    scheduler = Scheduler(
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        context_len=facts.context_len,
        eos_token_ids=facts.eos_token_ids,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        prefix_cache=config.prefix_cache,
        speculative=config.speculative,
    )
    return EngineCore(scheduler, runner), facts


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
