"""What Prometheus sees. Knows the metrics' names; knows no requests and no gRPC.

Events are counted where they happen; everything the engine already counts is read from its latest
statistics at the moment of a scrape, so the step loop does no work for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.client import EngineClient
from ..engine.messages import StepRecord, WeightsFacts
from .lifecycle import Lifecycle

# Fine where fast GPUs are: half a millisecond between tokens must not fall into the first bucket.
TOKEN_BUCKETS_S = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
)  # fmt: skip
STEP_TOKEN_BUCKETS = tuple(2.0**i for i in range(15))


class Metrics:
    """One registry per server, so that two servers in one process do not share numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests that ended, by outcome.", ["outcome"])
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self.output_tokens = self._counter("output_tokens", "Tokens sent to clients.")
        self.rejections = self._counter(
            "admission_rejections", "Requests refused at the door, by reason.", ["reason"]
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", REQUEST_BUCKETS_S
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Time per token after the first.", TOKEN_BUCKETS_S
        )
        self.queue_time = self._histogram(
            "queue_time_seconds", "Arrival to the first step that computed it.", REQUEST_BUCKETS_S
        )
        self.end_to_end = self._histogram(
            "request_duration_seconds", "Arrival to the last token.", REQUEST_BUCKETS_S
        )
        self.step_duration = self._histogram(
            "step_duration_seconds", "One step of the engine.", TOKEN_BUCKETS_S
        )
        self.step_tokens = self._histogram(
            "step_tokens", "Tokens computed in one step.", STEP_TOKEN_BUCKETS
        )

    def hear(self, record: StepRecord) -> None:
        self.step_duration.observe(record.duration_s)
        self.step_tokens.observe(record.num_tokens)

    def refuse(self, reason: str) -> None:
        self.rejections.labels(reason).inc()

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"pilotlight_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"pilotlight_{name}", text, buckets=buckets, registry=self.registry)


class EngineCollector(Collector):
    """The engine's own numbers, read when somebody asks."""

    def __init__(
        self, engine: EngineClient, lifecycle: Lifecycle, model_name: Callable[[], str]
    ) -> None:
        self._engine = engine
        self._lifecycle = lifecycle
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        yield from self._load()
        yield from self._counts()
        yield from self._life()
        yield from self._startup()

    def _load(self) -> Iterable[Metric]:
        s = self._engine.status.statistics
        kv_use = s.num_used_blocks / s.num_blocks if s.num_blocks else 0.0
        # The Gateway API's inference extension scrapes three gauges; vLLM's names are its default.
        for name, vllm_name, text, value in (
            ("requests_running", "num_requests_running", "Sequences in the batch.", s.num_running),
            ("requests_waiting", "num_requests_waiting", "Sequences that wait.", s.num_waiting),
            ("kv_cache_usage_ratio", "kv_cache_usage_perc", "KV blocks in use, 0 to 1.", kv_use),
        ):
            yield GaugeMetricFamily(f"pilotlight_{name}", text, value)
            alias = GaugeMetricFamily(f"vllm:{vllm_name}", text, labels=["model_name"])
            alias.add_metric([self._model_name()], value)
            yield alias
        yield GaugeMetricFamily(
            "pilotlight_kv_blocks_cached",
            "Free blocks with a reusable prefix.",
            s.num_cached_blocks,
        )

    def _counts(self) -> Iterable[Metric]:
        s = self._engine.status.statistics
        for name, text, value in (
            ("prefix_cache_query_tokens", "Prompt tokens looked up.", s.prefix_query_tokens),
            ("prefix_cache_hit_tokens", "Prompt tokens found.", s.prefix_hit_tokens),
            ("preemptions", "Sequences that lost their blocks.", s.num_preemptions),
            ("computed_tokens", "Tokens computed, recomputed ones too.", s.num_computed_tokens),
            ("drafted_tokens", "Tokens guessed and checked.", s.num_drafted_tokens),
            ("accepted_tokens", "Guesses that were right.", s.num_accepted_tokens),
            ("engine_steps", "Steps of this engine process.", s.num_steps),
            (
                "engine_restarts",
                "Engine processes started again.",
                self._engine.status.num_restarts,
            ),
        ):
            yield CounterMetricFamily(f"pilotlight_{name}", text, value)

    def _life(self) -> Iterable[Metric]:
        age_s = self._engine.heartbeat_age_s
        yield GaugeMetricFamily(
            "pilotlight_engine_heartbeat_age_seconds", "Since the engine was last heard.", age_s
        )
        yield GaugeMetricFamily("pilotlight_ready", "1 while ready.", self._lifecycle.is_ready)
        yield GaugeMetricFamily(
            "pilotlight_standby",
            "1 while a model can be ordered: none is loaded, or it sleeps.",
            self._lifecycle.is_resting,
        )
        yield GaugeMetricFamily(
            "pilotlight_draining", "1 while draining.", self._lifecycle.is_draining
        )
        info = InfoMetricFamily("pilotlight_model", "The model that is served.")
        facts = self._engine.status.facts
        architecture = {"architecture": facts.architecture, "dtype": facts.dtype} if facts else {}
        if name := self._model_name():
            info.add_metric([], {"name": name, **architecture})
        yield info

    def _startup(self) -> Iterable[Metric]:
        status = self._engine.status
        phases = GaugeMetricFamily(
            "pilotlight_startup_phase_seconds", "Duration of each phase.", labels=["phase"]
        )
        for phase in status.phases:
            phases.add_metric([phase.name], phase.duration_s)
        yield phases
        beside = GaugeMetricFamily(
            "pilotlight_startup_beside_seconds",
            "What ran beside the phases of the newest boot, by who did it.",
            labels=["name", "lane"],
        )
        for span in status.beside:
            beside.add_metric([span.name, span.lane], span.duration_s)
        yield beside
        yield from self._weights()
        total = status.bytes_total
        yield GaugeMetricFamily(
            "pilotlight_model_load_progress_ratio",
            "Bytes of weights loaded, 0 to 1.",
            status.bytes_done / total if total else 0.0,
        )
        yield GaugeMetricFamily(
            "pilotlight_model_load_bytes", "Bytes of weights loaded.", status.bytes_done
        )
        yield GaugeMetricFamily(
            "pilotlight_startup_ready_seconds",
            "Newest boot, from process start, restart or order to readiness; 0 until then.",
            self._lifecycle.ready_after_s,
        )
        for name, text, value in (
            ("port", "From process start to answering ports.", self._lifecycle.ports_open_s),
            (
                "first_token",
                "From process start to the first token sent.",
                self._lifecycle.first_token_s,
            ),
        ):
            yield GaugeMetricFamily(
                f"pilotlight_startup_{name}_seconds", f"{text} 0 before.", value
            )

    def _weights(self) -> Iterable[Metric]:
        facts = self._engine.status.facts
        w = facts.weights if facts else WeightsFacts()
        sources = GaugeMetricFamily(
            "pilotlight_startup_bytes",
            "Weights of the newest boot: mapped, copied, verified.",
            labels=["source", "way"],
        )
        for way in ("mapped", "copied", "verified"):
            if w.source:
                sources.add_metric([w.source, way], getattr(w, f"{way}_bytes"))
        yield sources
        for name, text, value in (
            ("read_bandwidth_bytes", "Bytes a second, reading and hashing.", w.read_bytes_per_s),
            ("copy_bandwidth_bytes", "Bytes a second, packing or copying.", w.copy_bytes_per_s),
            (
                "page_cache_fraction",
                "Of the weights' pages, in memory before the boot; -1: not known.",
                w.page_cache_fraction,
            ),
        ):
            yield GaugeMetricFamily(f"pilotlight_startup_{name}", text, value)
