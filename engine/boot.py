"""Puts an engine together: weights, runner, scheduler, one real token. Knows both sides.

torch is imported inside, never at the top: by a thread of the process that began with its first
breath (`TorchImport`), while files are looked at and bytes move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from .boot_report import BootReport
from .config import EngineConfig
from .core import EngineCore
from .errors import BadArtefact, EngineError
from .found_weights import FoundWeights, find_weights
from .locate import locate
from .messages import FinishReason, ModelFacts, Submit, WeightsFacts
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .torch_import import TorchImport
from .unload import give_memory_back

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Booted:
    """An engine that has generated a token, and what its weights rest on."""

    core: EngineCore
    facts: ModelFacts
    weights: FoundWeights
    files_in_use: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Its files may be evicted now."""
        self.weights.close()
        self.files_in_use.close()


def stand_by(torch_import: TorchImport, report: BootReport) -> None:
    """Everything that can be done without a model."""
    _await_torch(torch_import, report)
    from .worker import load

    load.prepare()


def boot(
    config: EngineConfig,
    report: BootReport,
    pulse: Callable[[], None],
    torch_import: TorchImport | None = None,
) -> Booted:
    """From a configuration to an engine that has generated a token. Raises SetupError.

    What can be refused from headers alone is refused before torch is waited for.
    """
    torch_import = torch_import or TorchImport()
    located = locate(config, report)
    with ExitStack() as stack:
        stack.enter_context(located.in_use)
        report.located(str(located.folder))
        report("check", 0, 0, "")
        booted = _boot_twice(config, located.folder, torch_import, report, pulse)
        booted.files_in_use = stack.pop_all()
    return booted


def _boot_twice(
    config: EngineConfig,
    folder: Path,
    torch_import: TorchImport,
    report: BootReport,
    pulse: Callable[[], None],
) -> Booted:
    """The second time only where an artefact turns out to be damaged."""
    try:
        return _boot(config, folder, torch_import, report, pulse)
    except BadArtefact as error:
        # It was condemned when it was found out: what is left is the checkpoint.
        logger.warning("%s; the checkpoint itself is loaded", error)
    # Only now: the error's traceback held what had been made ready, the cache among it.
    give_memory_back()
    return _boot(config, folder, torch_import, report, pulse)


def _boot(
    config: EngineConfig,
    folder: Path,
    torch_import: TorchImport,
    report: BootReport,
    pulse: Callable[[], None],
) -> Booted:
    weights = find_weights(config, folder)
    try:
        weights.start_moving()
        _await_torch(torch_import, report)
        core, facts = _core(config, weights, report, pulse)
        report("warm", 0, 0, "")
        warm(core)
        report("verify", 0, 0, config.verify)
        weights.finish_verifying()
        facts = replace(facts, weights=_read_facts(weights, facts.weights, report))
    except BaseException:
        weights.close()
        raise
    return Booted(core, facts, weights)


def _await_torch(torch_import: TorchImport, report: BootReport) -> None:
    report("import_torch", 0, 0, "")
    for name, began_s, ended_s in torch_import.wait():
        report.beside(name, "torch", began_s, ended_s)


def _read_facts(weights: FoundWeights, facts: WeightsFacts, report: BootReport) -> WeightsFacts:
    """What the verification beside the boot found out."""
    verification = weights.verification
    if verification is None or not verification.is_done:
        return facts
    report.beside("verify.chunks", "verify", verification.began_s, verification.ended_s)
    spent_s = verification.ended_s - verification.began_s
    return replace(
        facts,
        verified_bytes=weights.num_bytes,
        read_bytes_per_s=weights.num_bytes / spent_s,
        page_cache_fraction=verification.page_cache_fraction,
    )


def _core(
    config: EngineConfig, weights: FoundWeights, report: BootReport, pulse: Callable[[], None]
) -> tuple[EngineCore, ModelFacts]:
    from .worker.load import load_runner

    # On a CPU it is the same cores that schedule and compute.
    overlaps = config.overlap == "on" or (
        config.overlap == "auto" and weights.target.device != "cpu"
    )
    runner, facts = load_runner(config, weights, report, pulse, runs_ahead=overlaps)
    scheduler = Scheduler(
        num_blocks=facts.num_blocks,
        block_size=facts.block_size,
        context_len=facts.context_len,
        eos_token_ids=facts.eos_token_ids,
        max_num_seqs=config.max_num_seqs,
        max_batched_tokens=config.max_batched_tokens,
        prefix_cache=config.prefix_cache,
        # Guesses need the tokens so far on the host, which would make the device wait.
        speculative="off" if overlaps and config.speculative == "auto" else config.speculative,
        max_decode_slowdown=config.max_decode_slowdown,
        max_overtaking=config.max_overtaking,
        deterministic=config.deterministic,
    )
    return EngineCore(scheduler, runner, max_in_flight=1 + overlaps), facts


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
