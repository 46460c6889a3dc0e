"""The engine on a device: decode by batch, prompts by length, many at once, a trace.

Every figure is of whole steps of the real core, scheduling and sampling included. Knows the engine;
knows no limits and prints nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..engine.boot import Booted, boot
from ..engine.config import EngineConfig
from ..engine.core import EngineCore
from ..engine.messages import Submit
from ..engine.sampling_params import SamplingParams
from .arrivals import clamped
from .gpu_limits import median_s
from .replay import replay
from .throughput import sleep_until
from .traces import read_trace

NUM_DECODE_STEPS = 48
UNCAPTURED_STEPS = 80
"""Decode steps after which every graph is captured."""


@dataclass
class Phases:
    """When each phase of a boot began."""

    began_s: dict[str, float] = field(default_factory=dict)

    def __call__(self, phase: str, bytes_done: int, bytes_total: int, detail: str) -> None:
        self.began_s.setdefault(phase, time.monotonic())

    def located(self, folder: str) -> None:
        """Of no interest here."""

    def beside(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        """Only the boot's own line counts."""

    def seconds(self, ended_s: float) -> dict[str, float]:
        moments = [*self.began_s.values(), ended_s]
        return {name: round(moments[i + 1] - moments[i], 4) for i, name in enumerate(self.began_s)}


class Engine:
    """One booted engine and its figures."""

    def __init__(self, model: Path, device: str, **settings: Any) -> None:
        phases = Phases()
        config = EngineConfig(
            model=str(model), device=device, prefix_cache=False, max_decode_slowdown=0.0, **settings
        )
        self.booted: Booted = boot(config, phases, lambda: None)
        self.core: EngineCore = self.booted.core
        self.device = torch.device(device)
        self.phases_s = phases.seconds(time.monotonic())
        self._source = random.Random(0)
        self._num_submitted = 0

    def facts(self) -> dict[str, Any]:
        facts = self.booted.facts
        told = {
            "phases_s": self.phases_s,
            "kernels": facts.kernels,
            "weight_bytes": facts.weight_bytes,
            "kv_cache_bytes": facts.kv_cache_bytes,
        }
        if self.device.type == "cuda":
            told["memory_allocated_bytes"] = torch.cuda.memory_allocated()
            told["memory_reserved_bytes"] = torch.cuda.memory_reserved()
        return told

    def submit(self, input_len: int, output_len: int) -> None:
        self._num_submitted += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        vocab_size = self.booted.facts.vocab_size
        prompt = [self._source.randrange(vocab_size) for _ in range(input_len)]
        self.core.submit(Submit(f"r{self._num_submitted}", prompt, sampling))

    def run(self) -> tuple[float, list[float]]:
        """Seconds until nothing is left, and of each step."""
        steps_s = []
        began_s = time.perf_counter()
        while self.core.has_work:
            record = self.core.step()
            steps_s.append(record.duration_s if record else 0.0)
        return time.perf_counter() - began_s, steps_s

    def capture_all(self) -> None:
        """So that no capture falls into a step that is timed."""
        self.submit(4, UNCAPTURED_STEPS)
        self.run()

    def decode(self, batch: int, context_len: int) -> dict[str, float]:
        """A step of so many decodes: the median, and the share of it in which the device works."""
        for _ in range(batch):
            self.submit(context_len, NUM_DECODE_STEPS)
        _, steps_s = self.run()
        step_s = median(steps_s[-NUM_DECODE_STEPS // 2 : -2])
        figures = {"batch": batch, "step_s": step_s, "tokens_per_s": batch / step_s}
        device_s = self._replayed_s(batch)
        return figures | ({"device_s": device_s, "busy": device_s / step_s} if device_s else {})

    def _replayed_s(self, batch: int) -> float:
        """Of the graph alone; 0 where there is none."""
        runner: Any = self.core._runner
        decodes = runner._decodes
        graph = getattr(decodes, "_graphs", {}).get(decodes.num_padded(batch))
        return median_s(graph.replay, self.device) if graph else 0.0

    def prefill(self, input_len: int) -> dict[str, float]:
        self.submit(input_len, 1)
        self.run()
        self.submit(input_len, 1)
        spent_s, _ = self.run()
        return {"input_len": input_len, "seconds": spent_s, "tokens_per_s": input_len / spent_s}

    def throughput(self, num_seqs: int, input_len: int, output_len: int) -> dict[str, float]:
        for _ in range(num_seqs):
            self.submit(input_len, output_len)
        spent_s, _ = self.run()
        return {"seconds": spent_s, "output_tokens_per_s": num_seqs * output_len / spent_s}

    def traced(self, trace: Path, max_requests: int, speed: float) -> dict[str, Any]:
        context_len = self.booted.facts.context_len
        plans = [clamped(p, context_len) for p in read_trace(trace).faster(speed).plans]
        return replay(
            self.core,
            plans[:max_requests],
            self.booted.facts.vocab_size,
            time.perf_counter,
            sleep_until,
        )

    def tokens(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations, all at once."""
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self.core.submit(Submit(str(i), prompt, sampling))
        tokens: list[list[int]] = [[] for _ in prompts]
        while self.core.has_work:
            record = self.core.step()
            for output in record.outputs if record else ():
                tokens[int(output.request_id)] += output.token_ids
        return tokens
