"""The ops port: probes, the boot as JSON, and metrics that move with what happens."""

from __future__ import annotations

import json
import socket
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace
from pilotlight.engine.messages import Beside, WeightsFacts
from pilotlight.engine.status import EngineState
from pilotlight.proto import inference_pb2 as pb
from pilotlight.server.ops import LOOP_TIMEOUT_S, LoopPulse, OpsApp
from pilotlight.server.ports import address_of
from pilotlight.tests.fake_engine import PHASES, FakeEngine
from pilotlight.tests.served import Served, ids_request, served
from pilotlight.tests.server.wire import http_get, read, refusal, submitted
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

# ---- probes ------------------------------------------------------------------------------------


async def _probe(s: Served, path: str) -> tuple[int, dict[str, Any]]:
    status, body = await http_get(s, path)
    return status, json.loads(body)


async def test_probes_tell_life_from_readiness() -> None:
    async with served(FakeEngine(boots=False), is_ready=False) as s:
        assert (await _probe(s, "/livez"))[0] == 200
        assert await _probe(s, "/readyz") == (503, {"ready": False, "state": "STARTING"})
        await s.until(lambda: bool(s.engine.links))
        s.engine.link.become_ready()
        await s.until(lambda: s.server.lifecycle.is_ready)
        assert await _probe(s, "/readyz") == (200, {"ready": True, "state": "READY"})
        await s.server.drain()
        assert await _probe(s, "/readyz") == (503, {"ready": False, "state": "DRAINING"})
        assert (await _probe(s, "/livez"))[0] == 200


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
async def test_a_host_may_be_an_ipv6_address() -> None:
    async with served(host="::1") as s:
        status, _ = await http_get(s, "/readyz", host="::1")
        model = await s.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (status, model.context_len) == (200, s.engine.facts.context_len)
    assert address_of("::1", 80) == "[::1]:80"
    assert address_of("127.0.0.1", 80) == "127.0.0.1:80"


async def test_startup_is_the_boots_timeline() -> None:
    async with served() as s:
        status, boot = await _probe(s, "/startup")
    assert (status, boot["state"], boot["eta_s"]) == (200, "READY", 0.0)
    # The tokenizer may be later than an engine that only plays one.
    names = [phase["name"] for phase in boot["phases"] if phase["name"] != "read_text"]
    assert names == ["start_process", "start_engine", *PHASES]
    assert (boot["bytes_done"], boot["bytes_total"], boot["num_restarts"]) == (20, 20, 0)


async def test_another_path_names_those_there_are() -> None:
    async with served() as s:
        status, answer = await _probe(s, "/healthz")
    assert status == 404
    assert answer["paths"] == ["/metrics", "/livez", "/readyz", "/startup"]


@pytest.mark.parametrize(
    ("silent_s", "status"), [(0.0, "200 OK"), (LOOP_TIMEOUT_S + 1.0, "503 Service Unavailable")]
)
def test_a_stuck_event_loop_is_not_alive(silent_s: float, status: str) -> None:
    now_s = 0.0
    pulse = LoopPulse(clock=lambda: now_s)
    app = OpsApp(CollectorRegistry(), pulse, lambda: (True, "READY"), dict)
    statuses: list[str] = []
    now_s += silent_s
    body = app({"PATH_INFO": "/livez"}, lambda status, _: statuses.append(status))  # type: ignore[arg-type,return-value]
    assert statuses == [status]
    assert json.loads(b"".join(body))["loop_age_s"] == silent_s


# ---- metrics -----------------------------------------------------------------------------------


async def _metrics(s: Served) -> dict[str, float]:
    """Each sample by its name, and by its name with the values of its labels."""
    status, body = await http_get(s, "/metrics")
    assert status == 200
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            values = (value for _, value in sorted(sample.labels.items()))
            key = " ".join([sample.name, *values])
            found[key] = sample.value
    return found


async def test_counters_and_histograms_move_with_a_request() -> None:
    async with served() as s:
        before = await _metrics(s)
        await s.stub.Complete(ids_request([1, 2, 3], 8))
        after = await _metrics(s)
    assert before["pilotlight_output_tokens_total"] == 0
    assert after["pilotlight_output_tokens_total"] == 8
    assert after["pilotlight_prompt_tokens_total"] == 3
    assert after["pilotlight_requests_total length"] == 1
    assert after["pilotlight_step_tokens_sum"] == 3 + 7
    for name in ("time_to_first_token", "queue_time", "request_duration"):
        assert before[f"pilotlight_{name}_seconds_count"] == 0
        assert after[f"pilotlight_{name}_seconds_count"] == 1
    assert after["pilotlight_step_duration_seconds_count"] == 8


async def test_a_boot_is_told_in_numbers() -> None:
    weights = WeightsFacts(
        "artefact",
        mapped_bytes=4096,
        verified_bytes=4096,
        read_bytes_per_s=8e9,
        page_cache_fraction=0.25,
    )
    engine = FakeEngine(boots=False)
    engine.facts = replace(engine.facts, weights=weights)
    async with served(engine, is_ready=False) as s:
        await s.until(lambda: bool(s.engine.links))
        began_s = s.engine.clock()
        s.engine.link.say(Beside("torch.modules", "torch", began_s, began_s + 0.5))
        s.engine.link.become_ready()
        await s.until(lambda: s.server.lifecycle.is_ready)
        before = await _metrics(s)
        await s.stub.Complete(ids_request([1, 2, 3], 8))
        after = await _metrics(s)
        _, boot = await _probe(s, "/startup")
    name = "pilotlight_startup"
    assert after[f"{name}_beside_seconds torch torch.modules"] == pytest.approx(0.5)
    assert after[f"{name}_bytes artefact mapped"] == 4096
    assert after[f"{name}_bytes artefact copied"] == 0
    assert after[f"{name}_bytes artefact verified"] == 4096
    assert after[f"{name}_read_bandwidth_bytes"] == 8e9
    assert after[f"{name}_page_cache_fraction"] == 0.25
    assert 0 < before[f"{name}_port_seconds"] < after[f"{name}_first_token_seconds"]
    assert before[f"{name}_first_token_seconds"] == 0
    assert boot["weights"]["mapped_bytes"] == 4096
    assert boot["attributed"] == pytest.approx(1.0)
    [span] = [span for span in boot["beside"] if span["lane"] == "torch"]
    assert (span["name"], span["s"]) == ("torch.modules", 0.5)


async def test_time_between_tokens_is_measured_from_the_second_on() -> None:
    async with served(FakeEngine(is_held=True)) as s:
        stream = aiter(s.stub.Generate(ids_request([1, 2, 3], 4, request_id="a")))
        await submitted(s, "a")
        for _ in range(4):
            s.engine.link.step()
            await anext(stream)
        metrics = await _metrics(s)
    assert metrics["pilotlight_time_to_first_token_seconds_count"] == 1
    assert metrics["pilotlight_inter_token_latency_seconds_count"] == 3


async def test_requests_are_counted_by_how_they_ended() -> None:
    bad = ids_request([1, 2, 3])
    bad.sampling.n = 99
    async with served(FakeEngine(is_held=True), max_queued_requests=1) as s:
        call = s.stub.Generate(ids_request([1], request_id="a"))
        await submitted(s, "a")
        await refusal(s.stub.Complete(bad))
        await refusal(s.stub.Complete(ids_request([1])))
        call.cancel()
        await s.until(lambda: len(s.server.requests) == 0)
        await s.until(lambda: s.engine.link.core.live_request_ids() == [])
        metrics = await _metrics(s)
    assert metrics["pilotlight_requests_total invalidfield"] == 1
    assert metrics["pilotlight_requests_total queuefull"] == 1
    assert metrics["pilotlight_requests_total cancelled"] == 1
    assert metrics["pilotlight_admission_rejections_total max_queued_requests"] == 1


async def test_the_engines_gauges_are_there_under_vllms_names_too() -> None:
    engine = FakeEngine(is_held=True, num_blocks=64, max_num_seqs=1)
    async with served(engine, model_name="pilot") as s:
        calls = [s.stub.Generate(ids_request([1] * 7, request_id=name)) for name in "ab"]
        await submitted(s, "a")
        await submitted(s, "b")
        s.engine.link.step()
        s.engine.link.beat()
        await s.until(lambda: s.server.engine.status.statistics.num_running == 1)
        metrics = await _metrics(s)
        for call in calls:
            call.cancel()
    for ours, theirs, value in (
        ("requests_running", "num_requests_running", 1),
        ("requests_waiting", "num_requests_waiting", 1),
        ("kv_cache_usage_ratio", "kv_cache_usage_perc", 2 / 64),
    ):
        assert metrics[f"pilotlight_{ours}"] == value
        assert metrics[f"vllm:{theirs} pilot"] == value


async def test_prefix_hits_and_preemptions_are_counted() -> None:
    engine = FakeEngine(num_blocks=9, block_size=4, context_len=32, is_held=True)
    async with served(engine) as s:
        prompts = {"a": list(range(12)), "b": list(range(50, 62))}
        calls = [s.stub.Generate(ids_request(p, 12, request_id=i)) for i, p in prompts.items()]
        for request_id in prompts:
            await submitted(s, request_id)
        engine.link.release()
        for call in calls:
            await read(call)
        await s.stub.Complete(ids_request(prompts["a"], 2))
        engine.link.beat()
        await s.until(lambda: s.server.engine.status.statistics.num_steps > 0)
        metrics = await _metrics(s)
    assert metrics["pilotlight_preemptions_total"] >= 1
    assert metrics["pilotlight_prefix_cache_hit_tokens_total"] >= 8
    hits = metrics["pilotlight_prefix_cache_hit_tokens_total"]
    assert metrics["pilotlight_prefix_cache_query_tokens_total"] > hits
    assert metrics["pilotlight_computed_tokens_total"] >= 12 + 12 + 2 * 11


async def test_drafts_are_counted() -> None:
    """Of a vocabulary of one token every draft is right: one step after the prompt's brings 7."""
    engine = FakeEngine(vocab_size=1, speculative="ngram", is_held=True)
    async with served(engine) as s:
        call = s.stub.Generate(ids_request([0, 0, 0], 8, request_id="a"))
        await submitted(s, "a")
        engine.link.release()
        chunks = await read(call)
        engine.link.beat()
        await s.until(lambda: s.server.engine.status.statistics.num_drafted_tokens > 0)
        metrics = await _metrics(s)
    assert sum(len(chunk.token_ids) for chunk in chunks) == 8
    assert metrics["pilotlight_drafted_tokens_total"] == 6
    assert metrics["pilotlight_accepted_tokens_total"] == 6
    assert metrics["pilotlight_engine_steps_total"] == 2


async def test_life_and_boot_are_measured() -> None:
    async with served(max_restarts=1) as s:
        ready = await _metrics(s)
        s.engine.link.end("killed by SIGKILL")
        await s.until(lambda: len(s.engine.links) == 2)
        await s.wait_state(EngineState.READY)
        await s.server.drain()
        draining = await _metrics(s)
    assert (ready["pilotlight_ready"], ready["pilotlight_draining"]) == (1, 0)
    assert (draining["pilotlight_ready"], draining["pilotlight_draining"]) == (0, 1)
    assert ready["pilotlight_engine_restarts_total"] == 0
    assert draining["pilotlight_engine_restarts_total"] == 1
    for phase in PHASES:
        assert f"pilotlight_startup_phase_seconds {phase}" in ready
    assert ready["pilotlight_model_load_progress_ratio"] == 1.0
    assert ready["pilotlight_model_info FakeForCausalLM float32 model"] == 1
    assert ready["pilotlight_engine_heartbeat_age_seconds"] >= 0.0


async def test_buckets_are_fine_where_fast_gpus_are() -> None:
    async with served() as s:
        metrics = await _metrics(s)
    prefix = "pilotlight_inter_token_latency_seconds_bucket "
    bounds = [float(name.removeprefix(prefix)) for name in metrics if name.startswith(prefix)]
    assert min(bounds) <= 0.0005
    assert all(low < high for low, high in pairwise(bounds))
