"""The options of `pilotlight serve`: what each is called, means and may be.

Knows no values; config.ServeConfig has the fields and their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.logs import LEVELS

ATTENTION = ("flash", "pytorch", "triton", "cpu", "reference")
"""Folders of kernels/ that have it, without the one that --deterministic asks for."""


@dataclass(frozen=True, slots=True)
class Option:
    """One field of ServeConfig as a flag: `--` and the name with dashes."""

    name: str
    group: str
    help: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 2**62
    is_size: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


OPTIONS = (
    Option(
        "model_name",
        "model",
        "name that clients may ask for (default: the folder's, or org/name)",
        "NAME",
    ),
    Option(
        "standby",
        "model",
        "start without a model, with everything else done: LoadModel on the admin port brings one "
        "in little more than the time its bytes take",
    ),
    Option(
        "device",
        "model",
        "where to run; auto: CUDA if there is a usable device, else the CPU",
        choices=("auto", "cpu", "cuda"),
    ),
    Option(
        "dtype",
        "model",
        "of weights, and of the cache unless --kv-cache-dtype says otherwise; auto is the "
        "checkpoint's own on CUDA, and bfloat16 on a CPU that multiplies it, else float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    ),
    Option(
        "head_dtype",
        "model",
        "of the last product's matrix (lm_head); auto: as in the checkpoint; int8: rounded when "
        "weights are packed, for fewer bytes a token, results change a little",
        choices=("auto", "int8"),
    ),
    Option(
        "num_threads",
        "model",
        "CPU threads of the engine; 0: one for each core that this process, or its cgroup, may use",
        "N",
        high=4096,
    ),
    Option(
        "cache",
        "model",
        "folder of the weights cache, which later boots map; off: none "
        "(default: $PILOTLIGHT_CACHE, else the user's cache folder)",
        "DIR",
    ),
    Option(
        "verify",
        "model",
        "hashes of an artefact's chunks: full: checked before READY; lazy: behind it; off",
        choices=("full", "lazy", "off"),
    ),
    Option(
        "max_model_len",
        "capacity",
        "most tokens of one sequence, prompt and output; 0: as "
        "many as the model has and the cache holds",
        "TOKENS",
        high=1 << 24,
    ),
    Option("max_num_seqs", "capacity", "most sequences computed at once", "N", low=1, high=4096),
    Option(
        "max_batched_tokens",
        "capacity",
        "token budget of one step: decodes and prompt chunks together",
        "TOKENS",
        low=1,
        high=1 << 20,
    ),
    Option(
        "max_decode_slowdown",
        "capacity",
        "while sequences decode, a prompt gets as many tokens a step as keep it within so many "
        "times its length without prompts; several prompts get more. Higher: sooner first tokens, "
        "less even streams; 0: no limit",
        "TIMES",
        high=1000,
    ),
    Option(
        "max_overtaking",
        "capacity",
        "a shorter prompt is computed before longer ones that came earlier, each of which lets at "
        "most so many times its own tokens pass; 0: first come, first served",
        "TIMES",
        high=1000,
    ),
    Option(
        "kv_cache_bytes",
        "capacity",
        "memory of the KV cache, as 512MiB or 4GiB; 0: chosen from what is free",
        "BYTES",
        is_size=True,
    ),
    Option(
        "kv_cache_dtype",
        "capacity",
        "of keys and values; plain: that of the weights; auto: the same, but int16 in place of "
        "bfloat16 where a processor multiplies those faster (AVX2): finer, 3 % larger; int8, with "
        "a scale for each token's heads, or fp8 (e4m3) on newer GPUs: about twice as many tokens "
        "of bfloat16 in the same memory, results change, with int8 less than with fp8",
        choices=("auto", "plain", "int8", "fp8"),
    ),
    Option(
        "gpu_memory_fraction",
        "capacity",
        "of a card's memory, all that this engine may take: weights, cache, graphs and the rest",
        "SHARE",
        low=0.01,
        high=1,
    ),
    Option(
        "gpu_memory_bytes",
        "capacity",
        "the same in bytes, as 20GiB, for engines that share a card; 0: --gpu-memory-fraction",
        "BYTES",
        is_size=True,
    ),
    Option(
        "block_size", "capacity", "tokens in one block of the KV cache", "TOKENS", low=1, high=1024
    ),
    Option(
        "attention",
        "capacity",
        "whose attention: auto: the first of these that can be used (`pilotlight doctor` says "
        "which); flash: flash-attn, if it is installed; pytorch: the flash kernels inside PyTorch; "
        "triton; cpu; reference: plain PyTorch, slow",
        choices=("auto", *ATTENTION),
    ),
    Option(
        "prompt_attention",
        "capacity",
        "the same for prompts alone; auto: as --attention says",
        choices=("auto", *ATTENTION),
    ),
    Option(
        "deterministic",
        "capacity",
        "the same request, the same tokens, whatever else runs: prompts are computed in rows of "
        "fixed places, all memory that a request may need is set aside for it, and prefixes are "
        "shared in longer pieces. Fewer requests at once, later first tokens beside others",
    ),
    Option("prefix_cache", "capacity", "let requests share the blocks of equal prompt beginnings"),
    Option(
        "speculative",
        "capacity",
        "guess tokens from a sequence's own text and check the guesses in one step: the same "
        "answers, sooner where texts repeat; ngram: guess whatever followed the newest tokens "
        "before; auto: only where that is likely to pay; off",
        choices=("auto", "ngram", "off"),
    ),
    Option(
        "overlap",
        "capacity",
        "schedule a step and send it off while the one before it is computed; auto: on where the "
        "device computes by itself (CUDA), and then --speculative auto is off",
        choices=("auto", "on", "off"),
    ),
    Option("host", "network", "address of the data port (gRPC)", "HOST"),
    Option("port", "network", "data port; 0: a free one, printed at start", "PORT", high=65535),
    Option("ops_host", "network", "address of the ops port (default: that of --host)", "HOST"),
    Option(
        "ops_port",
        "network",
        "HTTP port of /metrics /livez /readyz /startup; 0: a free one",
        "PORT",
        high=65535,
    ),
    Option(
        "admin_port",
        "network",
        "port on 127.0.0.1 for LoadModel, UnloadModel, Sleep and Wake; 0: a free one; -1: none",
        "PORT",
        low=-1,
        high=65535,
    ),
    Option(
        "max_queued_requests",
        "admission",
        "most requests in the server, running and waiting, "
        "each sample counted; more get RESOURCE_EXHAUSTED; 0: four times --max-num-seqs",
        "N",
    ),
    Option(
        "max_queued_tokens",
        "admission",
        "most prompt tokens that wait to be computed; 0: as many as the KV cache holds",
        "TOKENS",
    ),
    Option(
        "drain_timeout",
        "life",
        "seconds that running streams get to finish after SIGTERM",
        "SECONDS",
        high=86400,
    ),
    Option(
        "drain_lag",
        "life",
        "seconds after SIGTERM during which new requests are still taken "
        "while readiness is already off, for load balancers that look rarely",
        "SECONDS",
        high=3600,
    ),
    Option(
        "on_engine_failure",
        "life",
        "restart the engine process, or exit so that an orchestrator does",
        choices=("restart", "exit"),
    ),
    Option(
        "restart_backoff",
        "life",
        "seconds before the first restart; doubled at each one in a row",
        "SECONDS",
        high=3600,
    ),
    Option("max_restarts", "life", "restarts in a row before the server gives up", "N", high=1000),
    Option(
        "heartbeat_timeout",
        "life",
        "seconds without a sign of life until readiness is off",
        "SECONDS",
        low=0.2,
        high=3600,
    ),
    Option(
        "stall_kill",
        "life",
        "seconds a stalled engine gets before it is killed",
        "SECONDS",
        high=86400,
    ),
    Option("log_level", "life", "least level that is logged", choices=LEVELS),
)

GROUPS = {
    "model": "the model and where it runs",
    "capacity": "how much runs at once",
    "network": "ports",
    "admission": "who comes in",
    "life": "life and death",
}
