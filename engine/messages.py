"""What crosses the border between front and engine process: token ids only, never text.

Every message is a msgspec struct in a tagged union: typed on both ends, never pickled.
Front -> engine: Boot, then Submit, Abort; Unload and another Boot; Stop. Engine -> front: Progress
while it boots, Ready, then StepRecord per step and Heartbeat on a clock; Standby when it is there
without a model; Failed at most once.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from .config import EngineConfig
from .sampling_params import SamplingParams


class FinishReason(IntEnum):
    """Why a sequence ended; numbers equal those of the proto's enum."""

    NONE = 0
    STOP = 1
    """A stop token of the model or the request, or a stop string."""
    LENGTH = 2
    """max_tokens, or the model's context is full."""
    ABORTED = 3
    """Cancelled by the caller, a deadline, or a shutdown."""
    ERROR = 4
    """This sequence could not be computed."""


class Boot(msgspec.Struct, frozen=True, tag=True):
    """Load the model of `config`, or be on standby where it names none."""

    config: EngineConfig


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Give weights and cache back and be on standby. What is still live ends as aborted."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    """One request; it becomes `sampling.n` sequences that share the prompt's blocks."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    """Only requests with equal salts share cached prefix blocks."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]
    index: int | None = None
    """Only this one of each request's samples."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End now; the front has drained already."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Where the boot is. `at_s` is time.monotonic() of the machine, one clock for all processes."""

    phase: str
    at_s: float
    bytes_done: int = 0
    bytes_total: int = 0
    detail: str = ""


class Located(msgspec.Struct, frozen=True, tag=True):
    """All files of the model that is booted are in this folder: it may have been fetched."""

    folder: str


class Beside(msgspec.Struct, frozen=True, tag=True):
    """A stretch of work that ended beside the boot's own line, by the clock of Progress.at_s."""

    name: str
    lane: str
    """The thread or process that did it."""
    began_s: float
    ended_s: float


class WeightsFacts(msgspec.Struct, frozen=True):
    """How the weights came into memory, in bytes; rates in bytes per second, 0 if not measured."""

    source: str = ""
    """artefact or checkpoint."""
    mapped_bytes: int = 0
    """Handed to the model as views of the file's own pages."""
    copied_bytes: int = 0
    """Written anew: packed, converted, or moved to a device."""
    num_copied_tensors: int = 0
    verified_bytes: int = 0
    """Hashed and found good before READY."""
    read_bytes_per_s: float = 0.0
    """Of bringing the pages in and hashing them."""
    copy_bytes_per_s: float = 0.0
    page_cache_fraction: float = -1.0
    """Of the file's pages, in memory before the boot touched them; -1: not known."""


class ModelFacts(msgspec.Struct, frozen=True):
    """What the loaded model is; found at load, never configured."""

    architecture: str
    vocab_size: int
    num_layers: int
    num_parameters: int
    weight_bytes: int
    context_len: int
    """Most tokens (prompt + output) a sequence may have here."""
    eos_token_ids: list[int]
    device: str
    dtype: str
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    kv_cache_dtype: str
    kernels: dict[str, str]
    """Operation -> implementation bound."""
    artefact: str = ""
    """Where the weights came from: cached, or the checkpoint and why."""
    weights: WeightsFacts = WeightsFacts()
    quantisation: str = ""
    """How the checkpoint's matrices are quantised; empty: they are not."""
    card: str = ""
    """The device's name, where it has one."""
    graph_bytes: int = 0
    activation_bytes: int = 0
    """Of the card, beside weights and cache, as a first boot measured it; see rehearsal.py."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A real token was generated."""

    facts: ModelFacts
    at_s: float


class Standby(msgspec.Struct, frozen=True, tag=True):
    """Everything but a model is there."""

    at_s: float
    reason: str = ""
    """Why the model that was asked for could not be loaded; the operator's to mend."""


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class Output(msgspec.Struct, array_like=True):
    """What one sequence gained in one step."""

    request_id: str
    index: int
    """Which of the request's n samples."""
    token_ids: list[int]
    """May be empty in a terminal record."""
    finish_reason: FinishReason = FinishReason.NONE
    stop_token_id: int = -1
    """The stop token that ended it; that token is also the last of token_ids."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    logprobs: list[float] | None = None
    top_logprobs: list[list[TopLogprob]] | None = None
    first_scheduled_s: float = 0.0
    """time.monotonic() when first scheduled; only in the sequence's first record."""
    error: str = ""

    def add_logprobs(self, chosen: float, top_ids: list[int], top: list[float]) -> None:
        """Of the token that was added last."""
        self.logprobs = [*(self.logprobs or []), chosen]
        others = [TopLogprob(*pair) for pair in zip(top_ids, top, strict=True)]
        self.top_logprobs = [*(self.top_logprobs or []), others]


class EngineStatistics(msgspec.Struct, frozen=True, array_like=True):
    """A frozen record of the scheduler and pool, as of one step."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    """Free blocks that still hold a reusable prefix."""
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_computed_tokens: int = 0
    num_steps: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    """Drafts that were right: each saved its sequence a step."""


class StepRecord(msgspec.Struct, tag=True):
    """Everything one step brought: one record, whatever the batch."""

    step: int
    outputs: list[Output]
    ended_s: float
    duration_s: float
    num_tokens: int


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Sent on a clock by its own thread; `pulse` counts layers run, so a long step shows life."""

    step: int
    pulse: int
    num_in_flight: int
    at_s: float
    live_request_ids: list[str]
    """The front aborts what it does not know."""
    statistics: EngineStatistics


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on. `is_setup`: the operator's to mend, exit code 2, no restart."""

    reason: str
    is_setup: bool


ToEngine = Boot | Unload | Submit | Abort | Stop
FromEngine = Progress | Located | Beside | Ready | Standby | StepRecord | Heartbeat | Failed
